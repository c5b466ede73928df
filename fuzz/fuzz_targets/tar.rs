#![no_main]
//! Archives of a server that lies.
use fairvault_engine::source::tar::Parser;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let mut parser = Parser::default();
    let mut input = data;
    while let Ok(Some(_)) = parser.next(&mut input) {}
});
