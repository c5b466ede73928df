#![no_main]
//! Names and texts from the outside: WAL files, histories, LSNs, connection strings, relation paths.
use fairvault_engine::postgres::files::relation_file;
use fairvault_engine::postgres::lsn::Lsn;
use fairvault_engine::postgres::segment::{History, WalFile};
use fairvault_engine::replication::conninfo::ConnInfo;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let _ = History::parse(7, data);
    let Ok(text) = std::str::from_utf8(data) else { return };
    let _ = text.parse::<Lsn>();
    let _ = relation_file(text);
    let _ = ConnInfo::parse_with(text, &|_| None);
    let _ = fairvault_format::names::parse_wal_file(text);
    let _ = fairvault_format::names::parse_piece(text);
    let _ = fairvault_format::names::parse_snapshot(text);
    for size in [1 << 20, 16 << 20, 1 << 30] {
        if let Ok(WalFile::Segment(segment)) = WalFile::parse(text, size) {
            assert_eq!(segment.name(size), text);
        }
    }
});
