//! What a person says once a parser of WAL was found to be wrong.
//!
//! What always holds: from that entry of the log on, no backup relies on a map that this parser made, nor on a backup
//! that did.

use fairvault_format::proto::{DistrustParser, log_entry::Kind as Entry};

use super::PARSER_VERSION;
use crate::commit::Log;
use crate::error::{Error, Result};

/// Longest reason that is kept, characters.
const REASON: usize = 500;

/// Distrusts a version of the parser; returns how many backups were built with it. There is no way back: a parser that
/// was repaired is another version.
pub async fn distrust(log: &mut Log, parser_version: u32, reason: &str) -> Result<usize> {
    if !(1..=PARSER_VERSION).contains(&parser_version) {
        let known = match PARSER_VERSION {
            1 => "it is 1".to_owned(),
            newest => format!("they are 1 to {newest}"),
        };
        return Err(Error::usage(format!(
            "parser {parser_version} is none that this version of fairvault knows"
        ))
        .remedy(format!("see parser_versions in `info --output json`; {known}")));
    }
    log.refresh().await?;
    let entry = DistrustParser {
        parser_version,
        reason: reason.chars().take(REASON).collect(),
    };
    let state = log.state();
    if !state.distrusted.iter().any(|d| d.parser_version == parser_version) {
        log.append(Entry::DistrustParser(entry), |_| Ok(())).await?;
    }
    let infos = log.state().backups.iter().filter_map(|backup| backup.info.as_ref());
    Ok(infos
        .filter(|info| info.parser_versions.contains(&parser_version))
        .count())
}
