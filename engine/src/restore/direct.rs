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

/// A file that is being read.
pub struct Input {
    /// Past the kernel's cache.
    direct: Option<File>,
    /// Through it.
    cached: File,
    buffer: Vec<u8>,
}

impl Input {
    /// Opens a file; what is not in the cache is read past it, if kernel and file system do that, for files of any size
    /// or only for large ones.
    pub fn open(path: &Path) -> std::io::Result<Self> {
        let cached = File::open(path)?;
        // The kernel must not read ahead: that would stay in its cache.
        let _ = rustix::fs::fadvise(&cached, 0, None, rustix::fs::Advice::Random);
        let direct = match cached.metadata()?.len() >= DIRECT_BYTES {
            true => open_direct(OpenOptions::new().read(true), path),
            false => None,
        };
        Ok(Self {
            direct,
            cached,
            buffer: Vec::new(),
        })
    }

    /// Reads exactly `len` bytes.
    pub fn read(&mut self, len: usize, at: u64) -> std::io::Result<&[u8]> {
        if self.buffer.len() < len + CHUNK_ALIGN {
            self.buffer.resize(len + CHUNK_ALIGN, 0);
        }
        let from = self.buffer.as_ptr().align_offset(CHUNK_ALIGN) % CHUNK_ALIGN;
        let bytes = &mut self.buffer[from..from + len];
        match read_past(&self.cached, bytes, at)? {
            Some(done) if done == len => return Ok(bytes),
            Some(_) => return Err(std::io::ErrorKind::UnexpectedEof.into()),
            None => {}
        }
        let is_aligned = len.is_multiple_of(CHUNK_ALIGN) && at.is_multiple_of(CHUNK_ALIGN as u64);
        let direct = self.direct.as_ref().filter(|_| is_aligned);
        if direct.is_none_or(|file| file.read_exact_at(bytes, at).is_err()) {
            self.cached.read_exact_at(bytes, at)?;
        }
        Ok(bytes)
    }
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
