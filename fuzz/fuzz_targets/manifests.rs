#![no_main]
//! Manifests that were opened with the right key and say nonsense.
use fairvault_engine::manifest::Manifest;
use fairvault_format::manifest::decode_segment;
use fairvault_format::proto::{Root, Usage};
use libfuzzer_sys::fuzz_target;
use prost::Message;

fuzz_target!(|data: &[u8]| {
    let Some((&split, rest)) = data.split_first() else {
        return;
    };
    let (root, segment) = rest.split_at(rest.len() * usize::from(split) / 255);
    if let (Ok(root), Ok(segment)) = (Root::decode(root), decode_segment(segment, "segment")) {
        let _ = Manifest::from_messages(root, Usage::default(), vec![segment], "root");
    }
});
