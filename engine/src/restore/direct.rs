//! Files that are read and written past the kernel's cache, where they are large and the file system does that.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use fairvault_format::frame::CHUNK_ALIGN;

use crate::cached::read_past;

/// Files of this size and more are written past the kernel's cache: what is restored is larger than that, more often
/// than not, and copying into it costs more than all else.
pub const DIRECT_BYTES: u64 = 1 << 20;

/// Writes shorter than this go through the cache, which puts the scattered pages of an incremental backup together.
const DIRECT_WRITE_BYTES: usize = 64 << 10;

/// A file that is being written.
pub struct Output {
    path: PathBuf,
    /// Past the kernel's cache.
    direct: Option<File>,
    /// Through it.
    cached: Option<File>,
}

impl Output {
    /// Opens a file; past the cache if it is large and the file system does that.
    pub fn open(path: &Path, is_large: bool) -> Self {
        let direct = match is_large {
            true => open_direct(OpenOptions::new().write(true), path),
            false => None,
        };
        Self {
            path: path.to_owned(),
            direct,
            cached: None,
        }
    }

    /// Writes a part of a chunk that begins at `in_chunk`. False if the file system refuses to go past the cache.
    pub fn write(&mut self, content: &[u8], in_chunk: u32, at: u64) -> std::io::Result<bool> {
        let is_suited = [u64::from(in_chunk), at, content.len() as u64]
            .iter()
            .all(|n| n % CHUNK_ALIGN as u64 == 0)
            && content.len() >= DIRECT_WRITE_BYTES;
        let mut goes_past = true;
        if let Some(file) = self.direct.as_ref().filter(|_| is_suited) {
            match file.write_all_at(content, at) {
                Err(error) if error.kind() == std::io::ErrorKind::InvalidInput => goes_past = false,
                other => return other.map(|()| true),
            }
        }
        if !goes_past {
            self.direct = None;
        }
        let file = match &mut self.cached {
            Some(file) => file,
            none => none.insert(OpenOptions::new().write(true).open(&self.path)?),
        };
        file.write_all_at(content, at).map(|()| goes_past)
    }
}

/// `None` where that is not possible.
#[cfg(target_os = "linux")]
fn open_direct(options: &mut OpenOptions, path: &Path) -> Option<File> {
    let flag = rustix::fs::OFlags::DIRECT.bits() as i32;
    options.custom_flags(flag).open(path).ok()
}

#[cfg(not(target_os = "linux"))]
fn open_direct(_: &mut OpenOptions, _: &Path) -> Option<File> {
    None
}

/// Read at once where less is asked for: what is asked for next lies behind it.
const WINDOW: usize = 512 << 10;

/// A file that is being read from front to back.
pub struct Input {
    /// Past the kernel's cache.
    direct: Option<File>,
    /// Through it.
    cached: File,
    buffer: Vec<u8>,
    /// What of the file is in the buffer, from its first aligned byte on.
    start: u64,
    len: usize,
}

impl Input {
    /// Opens a file; what is not in the cache is read past it, if kernel and file system do that, for files of any size
    /// or only for large ones. After a restore that failed, `is_resumed`, the disk is asked: what could not be written
    /// there may lie in the cache as if it had been.
    pub fn open(path: &Path, is_resumed: bool) -> std::io::Result<Self> {
        let cached = File::open(path)?;
        // The kernel must not read ahead: that would stay in its cache.
        let _ = rustix::fs::fadvise(&cached, 0, None, rustix::fs::Advice::Random);
        if is_resumed {
            let _ = rustix::fs::fadvise(&cached, 0, None, rustix::fs::Advice::DontNeed);
        }
        let direct = match cached.metadata()?.len() >= DIRECT_BYTES {
            true => open_direct(OpenOptions::new().read(true), path),
            false => None,
        };
        Ok(Self {
            direct,
            cached,
            buffer: Vec::new(),
            start: 0,
            len: 0,
        })
    }

    /// Reads exactly `len` bytes.
    pub fn read(&mut self, len: usize, at: u64) -> std::io::Result<&[u8]> {
        if at < self.start || at + len as u64 > self.start + self.len as u64 {
            self.fill(at, len)?;
        }
        let from = (at - self.start) as usize;
        let there = &self.buffer[self.aligned()..][..self.len];
        there
            .get(from..from + len)
            .ok_or_else(|| std::io::ErrorKind::UnexpectedEof.into())
    }

    fn aligned(&self) -> usize {
        self.buffer.as_ptr().align_offset(CHUNK_ALIGN) % CHUNK_ALIGN
    }

    /// Reads at least these bytes, if the file has them.
    fn fill(&mut self, at: u64, len: usize) -> std::io::Result<()> {
        self.start = at - at % CHUNK_ALIGN as u64;
        self.len = 0;
        let wanted = (len + (at - self.start) as usize).max(WINDOW);
        let wanted = wanted.next_multiple_of(CHUNK_ALIGN);
        if self.buffer.len() < wanted + CHUNK_ALIGN {
            self.buffer.resize(wanted + CHUNK_ALIGN, 0);
        }
        let from = self.aligned();
        let bytes = &mut self.buffer[from..from + wanted];
        self.len = match (read_past(&self.cached, bytes, self.start)?, &self.direct) {
            (Some(done), _) => done,
            (None, Some(direct)) => match read_all(direct, bytes, self.start) {
                Ok(done) => done,
                Err(_) => read_all(&self.cached, bytes, self.start)?,
            },
            (None, None) => read_all(&self.cached, bytes, self.start)?,
        };
        Ok(())
    }
}

/// Reads as much as there is.
fn read_all(file: &File, bytes: &mut [u8], at: u64) -> std::io::Result<usize> {
    let mut done = 0;
    while done < bytes.len() {
        match file.read_at(&mut bytes[done..], at + done as u64) {
            Ok(0) => break,
            Ok(n) => done += n,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
        // Past the cache, only the end of a file is not aligned.
        if !done.is_multiple_of(CHUNK_ALIGN) {
            break;
        }
    }
    Ok(done)
}

/// Makes room for all of a file, so that a full disk is noticed now, and writers need not wait for each other later.
/// Without `with_room`, only the length is set: what is not written stays a hole.
pub fn make_room(file: &File, size: u64, with_room: bool) -> std::io::Result<()> {
    #[cfg(target_os = "linux")]
    if with_room && size >= DIRECT_BYTES {
        use rustix::io::Errno;
        match rustix::fs::fallocate(file, rustix::fs::FallocateFlags::empty(), 0, size) {
            Ok(()) | Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => {}
            Err(error) => return Err(error.into()),
        }
    }
    file.set_len(size)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_read_as_they_are_wherever_they_lie() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        let all: Vec<u8> = (0..3_000_001u32).map(|at| (at * 7 % 251) as u8).collect();
        std::fs::write(&path, &all).unwrap();
        for is_resumed in [false, true] {
            let mut file = Input::open(&path, is_resumed).unwrap();
            for (at, len) in [
                (0, 8192),
                (8192, 8192),
                (500_000, 100_000),
                (524_288, 524_288),
                (1_048_577, 3),
                (1_048_580, 1_500_000),
                (2_999_999, 2),
                (3_000_001, 0),
                (10, 10),
            ] {
                let found = file.read(len, at as u64).unwrap();
                assert!(found == &all[at..at + len], "{len} bytes at {at}");
            }
            for (at, len) in [(2_999_999, 3), (3_000_001, 1), (9_000_000, 8192)] {
                let error = file.read(len, at).unwrap_err();
                assert_eq!(error.kind(), std::io::ErrorKind::UnexpectedEof, "{len} bytes at {at}");
            }
        }
    }
}
