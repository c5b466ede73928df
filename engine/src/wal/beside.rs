//! A segment that is pushed beside pieces that a receiver has stored of it: it must be the same WAL, or the pieces, which
//! commits were acknowledged by, would be taken for parts of it and deleted.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use fairvault_format::header::Kind as ObjectKind;

use super::archive::{Archive, other_content};
use super::fetch::Piece;
use super::whole::blocking;
use crate::error::{Context, Error, Kind, Result};
use crate::postgres::segment::Segment;

/// Bytes that are hashed at once.
const RUN: usize = 256 << 10;

impl Archive {
    /// Fails if the first `len` bytes of a file are not what a receiver has stored of `segment`. WAL that differs
    /// somewhere differs from there on, so the last piece tells.
    pub async fn check_beside(&self, segment: Segment, path: PathBuf, len: u64) -> Result<()> {
        let end = segment.start(self.segment_size).0 + len;
        let pieces = self.piece_list(segment).await?.into_iter();
        let Some(last) = pieces.filter(|piece| piece.end <= end).max_by_key(|piece| piece.end) else {
            return Ok(());
        };
        let compared = self.is_in_file(segment, path, &last).await;
        match compared.context(|| format!("comparing with {}/{}", self.stanza.shown(), last.object))? {
            true => Ok(()),
            false => Err(other_content(&self.stanza, &last.object)),
        }
    }

    async fn is_in_file(&self, segment: Segment, path: PathBuf, piece: &Piece) -> Result<bool> {
        let (epoch, header) = match self.header_of(ObjectKind::WalPiece, &piece.object).await {
            // The segment was completed meanwhile, which is what a push meets then.
            Err(error) if error.kind() == Kind::NotFound => return Ok(true),
            found => found?,
        };
        let key = self.stanza.keys_of(epoch)?.id_key;
        let from = piece.start - segment.start(self.segment_size).0;
        let len = piece.end - piece.start;
        let id = blocking("hashing WAL", move || {
            let failed = |e| Error::io(format_args!("reading {}", path.display()), e);
            let file = File::open(&path).map_err(failed)?;
            let mut hasher = blake3::Hasher::new_keyed(&key);
            let (mut at, mut run) = (0, vec![0; RUN]);
            while at < len {
                let now = (len - at).min(RUN as u64) as usize;
                file.read_exact_at(&mut run[..now], from + at).map_err(failed)?;
                hasher.update(&run[..now]);
                at += now as u64;
            }
            Ok(*hasher.finalize().as_bytes())
        });
        Ok(header.content_id == id.await?)
    }
}
