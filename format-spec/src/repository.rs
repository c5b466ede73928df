//! `fairvault.json`: what the repository as a whole is (SPEC.md, section 1).

use serde::{Deserialize, Serialize};

use crate::error::{FormatError, Result, check_limit};
use crate::limits;

/// Content of `fairvault.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Repository {
    format: String,
    version: u32,
    repository: String,
    #[serde(default)]
    features: Vec<String>,
}

impl Repository {
    /// A repository of this version.
    pub fn new(id: [u8; 16]) -> Self {
        Self {
            format: "fairvault".into(),
            version: 1,
            repository: hex::encode(id),
            features: Vec::new(),
        }
    }

    /// The bytes as stored.
    pub fn encode(&self) -> Vec<u8> {
        serde_json::to_vec_pretty(self).expect("a struct of strings and numbers is always JSON")
    }

    /// Reads `fairvault.json`.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        const WHAT: &str = "fairvault.json";
        check_limit(WHAT, bytes.len() as u64, limits::REPOSITORY_JSON_BYTES)?;
        let value: serde_json::Value =
            serde_json::from_slice(bytes).map_err(|e| FormatError::damaged(WHAT, e.to_string()))?;
        if value.get("format").and_then(|f| f.as_str()) != Some("fairvault") {
            return Err(FormatError::damaged(WHAT, "its \"format\" is not \"fairvault\""));
        }
        match value.get("version").and_then(serde_json::Value::as_u64) {
            Some(1) => {}
            Some(other) => return Err(FormatError::unsupported(WHAT, format!("format version {other}"))),
            None => return Err(FormatError::damaged(WHAT, "it has no version number")),
        }
        let this: Self = serde_json::from_value(value).map_err(|e| FormatError::damaged(WHAT, e.to_string()))?;
        if let Some(feature) = this.features.first() {
            return Err(FormatError::unsupported(WHAT, format!("feature {feature:?}")));
        }
        this.id()?;
        Ok(this)
    }

    /// The repository's id.
    pub fn id(&self) -> Result<[u8; 16]> {
        let mut id = [0u8; 16];
        hex::decode_to_slice(&self.repository, &mut id)
            .map_err(|_| FormatError::damaged("fairvault.json", "its repository id is not 32 hexadecimal digits"))?;
        Ok(id)
    }
}
