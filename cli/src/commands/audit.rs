//! `audit`.

use fairvault_engine::audit;
use fairvault_engine::error::{Context as _, Result};
use fairvault_engine::stanza::Stanza;

use super::Outcome;
use crate::args::Output;
use crate::context::Context;
use crate::output;

/// Runs it, in every repository.
pub async fn run(context: &Context, stanza: &str) -> Result<Outcome> {
    for repository in context.repositories(Some(stanza))? {
        let access = context.access(&repository, stanza, false, true)?;
        let opened = Stanza::open(&access).await?;
        let shown = opened.shown().to_owned();
        let found = audit::read(opened)
            .await
            .context(|| format!("repository {repository}"))?;
        if context.global.output == Output::Json {
            output::json(
                "audit",
                &serde_json::json!({ "repository": shown, "head": found.head, "entries": found.lines }),
            );
            continue;
        }
        output::line(&shown);
        for line in &found.lines {
            let user = match line.user.as_str() {
                "" => String::new(),
                user => format!("{user}@"),
            };
            output::line(format_args!(
                "{:>7}  {}  {user}{}  {}{}",
                line.seq,
                line.time,
                line.host,
                line.what,
                if line.void {
                    "  (VOID: its writer had been fenced, or had old keys)"
                } else {
                    ""
                }
            ));
        }
        output::line(format_args!(
            "  {} entries, each signed and following on the one before; the newest is {}",
            found.lines.len(),
            &found.head[..found.head.len().min(16)]
        ));
    }
    Ok(Outcome::Done)
}
