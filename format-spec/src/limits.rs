//! Every length that the format bounds (SPEC.md, section 12).

/// Largest pack, bytes.
pub const PACK_BYTES: u64 = 64 << 20;
/// Size at which a writer closes a pack, bytes.
pub const PACK_TARGET_BYTES: u64 = 32 << 20;
/// Most frames in a pack.
pub const PACK_FRAMES: u32 = 1 << 20;
/// Largest chunk of file content, bytes; chunks of whole files begin at multiples of it.
pub const CHUNK_BYTES: u32 = 512 << 10;
/// Largest chunk of a manifest segment, bytes.
pub const MANIFEST_CHUNK_BYTES: u32 = 4 << 20;
/// Largest section, bytes, sealed or plain.
pub const SECTION_BYTES: u64 = 256 << 20;
/// Largest object of structured sections (index run, manifest root, snapshot), bytes.
pub const OBJECT_BYTES: u64 = 2 * SECTION_BYTES + (1 << 20);
/// Largest WAL object, bytes: a segment of 1 GiB that does not compress, with its header.
pub const WAL_OBJECT_BYTES: u64 = (1 << 30) + (64 << 20);
/// Largest log entry, bytes.
pub const LOG_ENTRY_BYTES: u64 = 16 << 20;
/// Most sections in an object.
pub const SECTIONS: u32 = 65_536;
/// Largest manifest segment, bytes.
pub const MANIFEST_SEGMENT_BYTES: u64 = 64 << 20;
/// Longest path in a manifest, bytes.
pub const PATH_BYTES: usize = 4096;
/// Largest slot object, bytes.
pub const SLOT_BYTES: u64 = 64 << 10;
/// Largest `fairvault.json`, bytes.
pub const REPOSITORY_JSON_BYTES: u64 = 64 << 10;
/// Most memory that a slot may ask of Argon2id, KiB.
pub const ARGON2_MEMORY_KIB: u32 = 2 << 20;
/// Most passes of Argon2id.
pub const ARGON2_PASSES: u32 = 64;
/// Most lanes of Argon2id.
pub const ARGON2_LANES: u32 = 64;
/// Content bytes of a WAL object per section.
pub const WAL_SECTION_BYTES: usize = 4 << 20;
/// Content bytes of a journal's section.
pub const JOURNAL_SECTION_BYTES: usize = 1 << 20;
/// A snapshot is bound by every entry whose sequence number is a multiple of this.
pub const SNAPSHOT_INTERVAL: u64 = 16;
