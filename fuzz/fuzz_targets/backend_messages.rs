#![no_main]
//! Messages of a server that lies.
use bytes::BytesMut;
use fairvault_engine::replication::codec::{next, touch};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let mut buffer = BytesMut::from(data);
    while let Ok(Some(message)) = next(&mut buffer) {
        touch(&message);
    }
});
