#![no_main]
//! Log entries, key slots and the state that entries amount to.
use fairvault_engine::commit::state;
use fairvault_format::keys;
use fairvault_format::proto::{KeyEpoch, LogEntry, Snapshot};
use fairvault_format::repository::Repository;
use libfuzzer_sys::fuzz_target;
use prost::Message;

fuzz_target!(|data: &[u8]| {
    let _ = keys::decode_slot(data, "slot");
    let _ = Repository::decode(data);
    let first = KeyEpoch {
        epoch: 1,
        ..Default::default()
    };
    let mut state = Snapshot {
        key_epochs: vec![first],
        ..Default::default()
    };
    let mut rest = data;
    while let Some((&len, tail)) = rest.split_first() {
        let (entry, tail) = tail.split_at(usize::from(len).min(tail.len()));
        rest = tail;
        if let Ok(entry) = LogEntry::decode(entry) {
            let _ = state::apply(&mut state, &entry, 1);
        }
    }
});
