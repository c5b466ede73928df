//! A segment that is pushed beside pieces that a receiver has stored of it: it must be the same WAL, or the pieces, which
//! commits were acknowledged by, would be taken for parts of it and deleted.

use std::fs::File;
use std::io::Read;
use std::path::PathBuf;

use super::archive::{Archive, other_content};
use super::known::Known;
use super::whole::blocking;
use crate::error::{Error, Kind, Result};
use crate::postgres::segment::Segment;

/// Bytes that are compared at once.
const RUN: usize = 256 << 10;
/// Times that pieces are looked for while a receiver joins them.
const LOOKS: usize = 4;

impl Archive {
    /// Fails if the first `len` bytes of a file differ from what a receiver has stored of `segment`. What cannot be
    /// compared, because a piece is damaged or of other keys, is said: the segment as a whole is then worth more.
    pub async fn check_beside(&self, segment: Segment, path: PathBuf, len: u64) -> Result<()> {
        let mut looks = 0;
        let known = loop {
            looks += 1;
            match Known::pieces(self, segment).await {
                // Pieces were joined, or replaced by the segment.
                Err(error) if error.kind() == Kind::Temporary && looks < LOOKS => {}
                Err(error) if matches!(error.kind(), Kind::Damaged | Kind::Refused) => {
                    tracing::warn!(
                        "{} is not compared with what was received of it: {error}",
                        segment.name(self.segment_size)
                    );
                    return Ok(());
                }
                known => break known?,
            }
        };
        let Some(last) = known.pieces.last() else { return Ok(()) };
        let shown = last.object.clone();
        let compare = move || is_in_file(known, &path, len);
        match blocking("comparing WAL", compare).await? {
            true => Ok(()),
            false => Err(other_content(&self.stanza, &shown)),
        }
    }
}

fn is_in_file(mut known: Known, path: &std::path::Path, len: u64) -> Result<bool> {
    let failed = |e| Error::io(format_args!("reading {}", path.display()), e);
    let mut file = File::open(path).map_err(failed)?;
    let (mut at, mut run) = (0, vec![0; RUN]);
    let end = len.min(known.end as u64) as usize;
    while at < end && !known.is_compared() {
        let now = &mut run[..RUN.min(end - at)];
        file.read_exact(now).map_err(failed)?;
        if known.compare(at, now).is_err() {
            return Ok(false);
        }
        at += now.len();
    }
    Ok(true)
}
