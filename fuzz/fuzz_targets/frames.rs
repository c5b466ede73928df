#![no_main]
//! Frames and sections after opening: codecs and lengths.
use fairvault_format::frame::decode_chunk;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    if let Ok(chunk) = decode_chunk(data.to_vec(), "frame") {
        assert!(chunk.len() <= 4 << 20);
    }
});
