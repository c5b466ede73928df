//! The lock of a spool: one process has it at a time, and whoever comes second is told which.
//!
//! What always holds: the lock is that of the open file, and ends with its process. What the file says is for people, and
//! decides nothing: it may be of somebody who is gone.

use std::fs::{File, TryLockError};
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use crate::error::{Error, Kind, Result};
use crate::stanza::Stanza;

/// Its file in the spool's folder.
pub const NAME: &str = "receiver.lock";
/// Of what the file says, this is read.
const SAID_BYTES: u64 = 300;

/// Takes the lock, for as long as the file is open.
pub fn take(stanza: &Stanza, folder: &Path) -> Result<File> {
    let failed = |e| Error::io(format_args!("locking the receiver's spool {}", folder.display()), e);
    let mut options = File::options();
    let options = options.create(true).read(true).append(true).mode(0o600);
    let mut file = options.open(folder.join(NAME)).map_err(failed)?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            return Err(Error::new(
                Kind::Held,
                format!("another receiver uses {}: {}", folder.display(), holder(&file)),
            )
            .remedy("one receiver a stanza and repository is enough"));
        }
        Err(TryLockError::Error(e)) => return Err(failed(e)),
    }
    // A full disk is no reason to receive nothing.
    if let Err(e) = sign(stanza, &mut file) {
        tracing::debug!("who has {} is not noted in it: {e}", folder.join(NAME).display());
    }
    Ok(file)
}

/// Says in the file who has it.
fn sign(stanza: &Stanza, file: &mut File) -> std::io::Result<()> {
    let since = jiff::Timestamp::from_microsecond(stanza.env().now_us()).unwrap_or_default();
    let (pid, host) = (std::process::id(), stanza.host());
    let since = since.strftime("%Y-%m-%dT%H:%M:%SZ");
    file.set_len(0)?;
    file.write_all(format!("process {pid} on {host} since {since}\n").as_bytes())
}

/// Who has it, in words.
fn holder(file: &File) -> String {
    let mut said = Vec::new();
    let read = file.take(SAID_BYTES).read_to_end(&mut said);
    let said = String::from_utf8_lossy(&said);
    let line = said.lines().next().unwrap_or_default().replace(char::is_control, "?");
    match read {
        Ok(_) if !line.is_empty() => line,
        _ => "a process that has not said which it is".to_owned(),
    }
}
