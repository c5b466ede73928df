#![no_main]
//! Headers, footers and directories of packs and index runs.
use fairvault_format::keys::{EpochKeys, Scope};
use fairvault_format::{index, pack};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let keys = EpochKeys {
        epoch: 1,
        data_key: Some([1; 32]),
        data_private_key: None,
        id_key: [2; 32],
        meta_key: [3; 32],
        writer_seed: None,
        operator_seed: None,
        public_keys: Default::default(),
    };
    let scope = Scope {
        repository: [4; 16],
        stanza: [5; 16],
    };
    let _ = pack::open_pack(&keys, &scope, data, "pack");
    let _ = index::open_run(&keys, &scope, data, "run");
    let (names, headers) = data.split_at(data.len() * 2 / 7);
    let _ = index::decode_pack_table(names, headers, "table");
    let _ = pack::Footer::decode(data, data.len() as u64, "pack");
});
