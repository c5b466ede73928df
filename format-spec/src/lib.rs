//! The fairvault repository format, version 1: what the bytes in a repository mean.
//!
//! `SPEC.md` beside this crate is the specification, `THREATS.md` says who can do what with which
//! credentials, and `proto/fairvault.proto` has the structured messages. This crate encodes and decodes
//! and does nothing else: no files, no network, no clock, no randomness (salts and nonces come in as
//! arguments).
//!
//! What always holds:
//! - every length is compared with [`limits`] before anything is allocated for it;
//! - input that a newer version may have written is [`FormatError::Unsupported`], never "damaged";
//! - nothing panics on any input.

mod columns;
pub mod erased;
pub mod error;
pub mod frame;
pub mod header;
pub mod index;
pub mod journal;
pub mod keys;
#[cfg(debug_assertions)]
mod known_good;
pub mod limits;
pub mod log;
pub mod manifest;
pub mod names;
pub mod object;
pub mod pack;
pub mod pages;
pub mod public;
pub mod records;
pub mod repository;
pub mod wal;

/// The messages of `proto/fairvault.proto`.
#[allow(missing_docs, clippy::all)]
pub mod proto {
    include!(concat!(env!("OUT_DIR"), "/fairvault.v1.rs"));
}

pub use error::{FormatError, Result};

/// SHA-256 of `bytes`: the name of hash-named objects.
pub fn sha256(bytes: &[u8]) -> [u8; 32] {
    use sha2::Digest;
    sha2::Sha256::digest(bytes).into()
}
