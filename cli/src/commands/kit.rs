//! `key export` and `key import`: the slots of a stanza in a file, for when the repository has lost them.
//!
//! What always holds: a file that was written opens every key epoch with the secret it was written with; of a file that is
//! damaged, what is left of it is brought back; nothing is written over.

use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use fairvault_engine::commit::Log;
use fairvault_engine::error::{Context as _, Error, Result};
use fairvault_engine::stanza::kit::{self, Kit};
use fairvault_engine::stanza::{Access, Stanza, erasure, read_repository};
use fairvault_engine::store::Created;
use fairvault_format::{keys, limits, names, proto};

use super::Outcome;
use crate::args::Output;
use crate::context::Context;
use crate::output;

/// First word of a line with a slot in an exported file.
const SLOT: &str = "slot";

/// Slots are wrapped: the file alone opens nothing.
pub async fn export(context: &Context, stanza: &str, path: &Path) -> Result<Outcome> {
    let mut text = format!(
        "# Key slots of stanza {stanza}, written by fairvault {}.\n\
         # Together with a key file or passphrase that belongs to one of them, they open the stanza.\n\
         # If the objects below {stanza}/keys/ are lost: fairvault key import {stanza} FILE\n",
        env!("CARGO_PKG_VERSION")
    );
    let mut read = Vec::new();
    for repository in context.repositories(Some(stanza))? {
        let access = context.access(&repository, stanza, false, true)?;
        // All of it: it says which of the slots that this host remembers were removed. Not of a stanza that was erased, as it
        // says as well.
        let log = Log::replay(Stanza::open(&access).await?).await?;
        let began_us = log.stanza().env().now_us();
        let kit = kit::collect(&log, &access).await;
        let kit = kit.context(|| format!("repository {repository}; nothing was written"))?;
        let opened = log.stanza();
        text += &format!(
            "repository {} {}\n",
            hex::encode(opened.scope().repository),
            opened.shown()
        );
        for (name, slot) in &kit.slots {
            text += &format!("{SLOT} {name} {}\n", hex::encode(slot));
        }
        read.push((repository, log, began_us, kit));
    }
    let written = write_new(path, &text);
    let (mut all, mut outcome) = (Vec::new(), Outcome::Done);
    for (repository, mut log, began_us, kit) in read {
        let bytes: usize = kit.slots.values().map(Vec::len).sum();
        let count = kit.slots.len();
        let end = written.as_ref().map(|()| format!("{count} slots written to a file"));
        log.note_end("key export", began_us, bytes as u64, end).await;
        if written.is_ok() && !say(context, &repository, stanza, &kit) {
            outcome = Outcome::Warnings;
        }
        all.push(serde_json::json!({ "repository": repository, "slots": count, "epochs": kit.epochs }));
    }
    written?;
    if context.global.output == Output::Json {
        output::json(
            "key-export",
            &serde_json::json!({ "stanza": stanza, "file": path.display().to_string(), "exported": all }),
        );
        return Ok(outcome);
    }
    output::line(format_args!(
        "{} is written. Keep it apart from the key or passphrase that it needs",
        path.display()
    ));
    Ok(outcome)
}

/// Says what was exported of a repository; returns whether nobody needs to look at it.
fn say(context: &Context, repository: &str, stanza: &str, kit: &Kit) -> bool {
    if context.global.output == Output::Text {
        let (slots, epochs) = (kit.slots.len(), kit.epochs);
        let how = match kit.reads {
            true => "",
            false => ", for writing: that another slot reads is proved only by an export with the operator's key",
        };
        output::line(format_args!(
            "{repository}: {slots} slots, by which the given key opens all key epochs ({epochs}){how}"
        ));
    }
    for why in &kit.left_out {
        tracing::warn!("{repository}: left out: {why}");
    }
    if !kit.remembered.is_empty() {
        tracing::warn!(
            "{repository}: the repository has lost {}, which this host remembers: bring back what was exported with \
             `fairvault key import {stanza} FILE`",
            kit.remembered.join(", ")
        );
    }
    kit.left_out.is_empty() && kit.remembered.is_empty()
}

/// Writes a file that is not there yet.
fn write_new(path: &Path, text: &str) -> Result<()> {
    let what = || format!("writing {}", path.display());
    let mut options = std::fs::OpenOptions::new();
    let file = options.write(true).create_new(true).mode(0o600).open(path);
    let mut file = file.map_err(|e| Error::io(what(), e).remedy("an existing file is never overwritten"))?;
    let written = file.write_all(text.as_bytes()).and_then(|()| file.sync_all());
    written.map_err(|e| Error::io(what(), e))
}

/// A slot of an exported file, and its bytes.
type Line = (proto::Slot, Vec<u8>);

/// The slots in an exported file, and why other lines are none.
fn parse(text: &str) -> (Vec<Line>, Vec<String>) {
    let (mut slots, mut left_out) = (Vec::new(), Vec::new());
    for (at, line) in text.lines().enumerate().filter(|(_, line)| line.starts_with(SLOT)) {
        match parse_line(line) {
            Ok(slot) => slots.push(slot),
            Err(why) => left_out.push(format!("line {}: {why}", at + 1)),
        }
    }
    (slots, left_out)
}

fn parse_line(line: &str) -> std::result::Result<Line, String> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let [_, name, slot] = words.as_slice() else {
        return Err("a line with a slot has three words".to_owned());
    };
    let bytes = hex::decode(slot).map_err(|_| "a slot is not hexadecimal".to_owned())?;
    let decoded = keys::decode_slot(&bytes, name).map_err(|error| error.to_string())?;
    names::check_name("slot name", &decoded.name).map_err(|error| error.to_string())?;
    match *name == names::slot(decoded.epoch, &decoded.name) {
        true => Ok((decoded, bytes)),
        false => Err("a slot has the name of another".to_owned()),
    }
}

/// Brings slots back, as far as they can be used.
pub async fn import(context: &Context, stanza: &str, path: &Path) -> Result<Outcome> {
    let text = std::fs::read(path).map_err(|e| Error::io(format_args!("reading {}", path.display()), e))?;
    let (slots, left_out) = parse(&String::from_utf8_lossy(&text));
    for why in &left_out {
        tracing::warn!("{}: left out: {why}", path.display());
    }
    let mut all = Vec::new();
    for repository in context.repositories(Some(stanza))? {
        let store = context.open_repository(&repository, false)?;
        let id = read_repository(&store).await?.id()?;
        let store = store.folder(stanza);
        let own: Vec<_> = slots.iter().filter(|(slot, _)| slot.repository_id == id).collect();
        let decoded: Vec<_> = own.iter().map(|(slot, _)| slot.clone()).collect();
        let access = context.access(&repository, stanza, false, true)?;
        erasure::check_import(&access, &decoded).await?;
        let (mut count, mut stored) = (0, 0);
        let mut others = Vec::new();
        let storing = async {
            for (slot, bytes) in own {
                let name = names::slot(slot.epoch, &slot.name);
                match store.create(&name, bytes.clone().into(), limits::SLOT_BYTES).await? {
                    Created::Won if context.global.output == Output::Json => {}
                    Created::Won => output::line(format_args!("{repository}: {name} is there")),
                    // It may be anything. The others are brought back all the same.
                    Created::Lost(_) => {
                        others.push(name);
                        continue;
                    }
                }
                count += 1;
                stored += bytes.len() as u64;
                all.push(serde_json::json!({ "repository": repository, "object": name }));
            }
            match others.is_empty() {
                true => Ok(()),
                false => Err(Error::refused(format!(
                    "{}: {} is there, and another one",
                    store.shown(),
                    others.join(", ")
                ))
                .remedy("nothing is written over; see `fairvault key list`, and delete what is there only if it opens nothing")),
            }
        };
        let done: Result<()> = storing.await;
        if count > 0 {
            note_import(&access, count, stored, done.as_ref().err()).await;
        }
        done?;
    }
    if all.is_empty() {
        let why = left_out.first().map(|why| format!(" ({why})")).unwrap_or_default();
        return Err(Error::usage(format!(
            "{}: it holds no slot of a configured repository that can be used{why}",
            path.display()
        )));
    }
    if context.global.output == Output::Json {
        output::json("key-import", &serde_json::json!({ "stanza": stanza, "imported": all }));
    }
    match left_out.is_empty() {
        true => Ok(Outcome::Done),
        false => Ok(Outcome::Warnings),
    }
}

/// In the log, as far as what was imported opens it: the secret may be elsewhere.
async fn note_import(access: &Access, count: usize, bytes: u64, error: Option<&Error>) {
    let opened = async { Log::open(Stanza::open(access).await?).await };
    match opened.await {
        Ok(mut log) => {
            let (now_us, said) = (log.stanza().env().now_us(), format!("{count} slots are there"));
            log.note_done("key import", now_us, bytes, said, error).await;
        }
        Err(error) => tracing::debug!("nothing is noted in the log: {error}"),
    }
}
