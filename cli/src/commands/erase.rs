//! `key erase`: the end of a stanza.

use fairvault_engine::error::{Context as _, Error, Result};
use fairvault_engine::stanza::erase;

use super::Outcome;
use crate::args::{EraseArgs, Output};
use crate::context::Context;
use crate::output;

/// What no erasure reaches.
const REMAINS: [&str; 4] = [
    "files that `key export` has written: with one of them and its secret, everything opens that was stored before",
    "copies of the repository, and snapshots of its disk or bucket, that have the slots",
    "what other hosts remember, until they look at this stanza once more: slots, and of passphrases the keys themselves",
    "other repositories with copies of these backups, which have keys of their own",
];

/// In every repository, or nothing is begun in any.
pub async fn run(context: &Context, args: &EraseArgs) -> Result<Outcome> {
    let stanza = &args.stanza;
    if args.confirm != *stanza {
        return Err(Error::usage(format!(
            "--confirm says {:?}, and the stanza is {stanza:?}",
            args.confirm
        ))
        .remedy("give the stanza's name twice: what is erased can never be read again"));
    }
    let mut planned = Vec::new();
    for repository in context.repositories(Some(stanza))? {
        let access = context.access_to_delete(&repository, stanza)?;
        let plan = erase::plan(&access).await;
        let plan = plan.context(|| format!("repository {repository}; nothing was erased"))?;
        planned.push((repository, access, plan));
    }
    let (mut all, mut outcome) = (Vec::new(), Outcome::Done);
    for (repository, access, plan) in planned {
        let done = erase::erase(&access, &args.reason, plan).await;
        let done = done.context(|| format!("erasing stanza {stanza} in repository {repository}"))?;
        if !done.left.is_empty() {
            outcome = Outcome::Warnings;
        }
        if context.global.output == Output::Text {
            output::line(format_args!(
                "{repository}: stanza {stanza} is erased (entry {} of its log): {} slots and {} older versions of slots were deleted",
                done.erased.seq, done.slots, done.versions
            ));
            for left in &done.left {
                output::line(format_args!("{repository}: NOT destroyed: {left}"));
            }
        }
        all.push(
            serde_json::json!({ "repository": repository, "entry": done.erased.seq, "slots": done.slots,
            "versions": done.versions, "left": done.left }),
        );
    }
    match context.global.output {
        Output::Json => output::json(
            "key-erase",
            &serde_json::json!({ "stanza": stanza, "erased": all, "remains": REMAINS }),
        ),
        Output::Text => {
            output::line("Not reached by this, and to be destroyed by you where there are such:");
            for remains in REMAINS {
                output::line(format_args!("  - {remains}"));
            }
            output::line(format_args!(
                "Destroy the key files and passphrases of stanza {stanza} as well; what is stored can be deleted at any time"
            ));
        }
    }
    Ok(outcome)
}
