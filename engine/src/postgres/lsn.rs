//! Log sequence numbers and timelines, as types.

use std::fmt;
use std::str::FromStr;

/// A position in the WAL, bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Lsn(pub u64);

impl fmt::Display for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:X}/{:X}", self.0 >> 32, self.0 & 0xFFFF_FFFF)
    }
}

impl FromStr for Lsn {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || format!("{text:?} is not an LSN: expected two hexadecimal numbers, such as 0/3000148");
        let (high, low) = text.split_once('/').ok_or_else(bad)?;
        let part = |digits: &str| {
            (!digits.is_empty() && digits.len() <= 8 && digits.bytes().all(|b| b.is_ascii_hexdigit()))
                .then(|| u64::from_str_radix(digits, 16).ok())
                .flatten()
        };
        Ok(Self(part(high).ok_or_else(bad)? << 32 | part(low).ok_or_else(bad)?))
    }
}
