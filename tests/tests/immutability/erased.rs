//! A stanza that was erased, and one of which somebody only says so.

use super::*;

/// A stanza is erased as far as its bucket lets it, and what is left is said.
pub async fn slots_go_as_far_as_they_are_not_locked(server: &Server) -> Result<()> {
    let erase = ["key", "erase", "acme", "--confirm", "acme"];
    for (name, is_locked) in [("erased", false), ("erasedsuspended", false), ("erasedlocked", true)] {
        let w = World::new(name, server, is_locked, "")?;
        w.backup()?;
        let is_suspended = name == "erasedsuspended";
        if is_suspended {
            // What it has kept so far is still there.
            bucket::set_versioning(server, name, "Suspended")?;
        }
        let slots = async || -> Result<Vec<Object>> { Ok(w.store.all_versions("acme/keys/").await?) };
        ensure!(slots().await?.len() == 1);
        let (exit, text) = w.s.fairvault(&erase);
        let left: usize = slots().await?.iter().map(|slot| slot.contents().count()).sum();
        match is_locked {
            false => ensure!(
                exit == 0 && text.contains("1 older versions") && left == 0,
                "{exit} {text}"
            ),
            true => ensure!(
                exit == 6
                    && text.contains("NOT destroyed: a version of keys/00000001/main is locked until")
                    && left == 1,
                "{exit} {text}"
            ),
        }
        // It can be run again, and what is below a marker is not brought back by accident.
        ensure!(w.s.fairvault(&erase).0 == exit);
        refused(
            w.s.fairvault(&["repair", "acme", "--progress", "none"]),
            1,
            "was erased at",
        )?;
        refused(w.s.fairvault(&["info", "acme"]), 1, "was erased at")?;
        ensure!(slots().await?.iter().all(|slot| !slot.is_visible()));
        // Without its note, what the bucket hides stays hidden: where a slot is left that opens the log, that says so, also if
        // its end is hidden; where none is, the note does, for as long as the bucket hides it, too.
        if !is_suspended {
            let mut gone = vec!["acme/erased".to_owned()];
            if is_locked {
                let objects = w.objects().await?;
                let log = objects.iter().filter(|object| object.name.starts_with("acme/log/"));
                gone.extend(log.map(|object| object.name.clone()).max());
            }
            w.store.delete(&gone).await?;
            let why = if is_locked {
                "its log says so"
            } else {
                "which is hidden by a deletion"
            };
            let repair = w.s.fairvault(&["repair", "acme", "--progress", "none"]);
            refused(repair, 1, why)?;
            ensure!(slots().await?.iter().all(|slot| !slot.is_visible()));
        }
    }
    Ok(())
}

/// Whoever hides keys and log may also write that the stanza was erased, or anything in the place of that. The log is behind
/// it, and says that it was not.
pub async fn a_note_that_somebody_left_is_no_erasure(server: &Server) -> Result<()> {
    let w = World::new("noted", server, true, "")?;
    w.backup()?;
    let forged = r#"{"format": "fairvault-erased", "version": 1, "entry": 3, "time_us": 1, "host": "h", "user": "u"}"#;
    let is_opening = |name: &str| name.starts_with("acme/keys/") || name.starts_with("acme/log/");
    let put = async |name: &str, text: &'static str| {
        let content = Bytes::from_static(text.as_bytes());
        w.store.put_hashed(&format!("acme/{name}"), content.into()).await
    };
    let hide_all = async || -> Result<BTreeSet<String>> {
        let mut hidden = BTreeSet::new();
        let now = w.objects().await?;
        for (number, object) in now.iter().filter(|object| is_opening(&object.name)).enumerate() {
            hide(&w.store, number, object).await?;
            hidden.insert(object.name.trim_start_matches("acme/").to_owned());
        }
        w.forget()?;
        Ok(hidden)
    };
    // No note at all, one that says what it likes, and one that the bucket hides.
    for note in ["garbage", forged, ""] {
        match note {
            "" => w.store.delete(&["acme/erased".to_owned()]).await?,
            note => put("erased", note).await?,
        }
        let hidden = hide_all().await?;
        if note == forged {
            refused(w.s.fairvault(&["info", "acme"]), 1, "they ask the log")?;
            let (exit, said) = w.s.fairvault(&["repair", "acme", "--dry-run", "--progress", "none"]);
            ensure!(
                exit == 1 && said.contains("without --dry-run brings back") && said.contains("the log does not"),
                "{exit} {said}"
            );
        }
        let (exit, repaired) = w.report(&["repair"])?;
        ensure!(
            exit == 0 && names_of(&repaired["hidden"], "object") == hidden,
            "{hidden:?} {exit} {repaired}"
        );
        w.s.ok(&["verify", "acme", "--progress", "none"])?;
    }
    // Together with something where the next entry belongs, and behind it: keys come back, and then that goes.
    let numbers = w.objects().await?;
    let numbers = numbers
        .iter()
        .filter_map(|object| object.name.strip_prefix("acme/log/")?.parse::<u64>().ok());
    let next = numbers.max().context("a log")? + 1;
    hide_all().await?;
    put("erased", forged).await?;
    put(&format!("log/{next:020}"), "garbage").await?;
    put(&format!("log/{:020}", 999_999), "garbage").await?;
    let drop = ["repair", "acme", "--progress", "none", "--drop-entry"];
    let number = next.to_string();
    refused(
        w.s.fairvault(&["repair", "acme", "--progress", "none"]),
        4,
        &format!("--drop-entry {next}"),
    )?;
    // Entries are hidden as well: what is no entry goes first, since it is what the log is stuck at.
    w.s.ok(&[&drop[..], &[&number]].concat())?;
    let (exit, repaired) = w.report(&["repair"])?;
    ensure!(exit == 0, "{repaired}");
    // What lies behind the end stops no backup and no restore.
    w.backup()?;
    w.forget()?;
    let (exit, said) = w.s.restore("copy", &[]);
    ensure!(exit == 0, "{said}");
    w.s.ok(&[&drop[..], &["999999"]].concat())?;
    let audit = w.s.ok(&["audit", "acme"])?;
    ensure!(audit.contains(&format!("log/{:020}", 999_999)), "{audit}");
    Ok(())
}
