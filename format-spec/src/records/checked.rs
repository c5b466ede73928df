//! What is stored was put together again first.

use super::{Decoder, Encoder, largest};

/// Takes runs apart and proves that they come back; keeps its buffers from one to the next.
#[derive(Debug, Default)]
pub struct Checked {
    encoder: Encoder,
    decoder: Decoder,
    transformed: Vec<u8>,
    back: Vec<u8>,
}

impl Checked {
    /// `run`, whose first byte is at the LSN `start`, taken apart; `None` where there are no records, or where it would
    /// not come back.
    pub fn transform(&mut self, run: &[u8], start: u64) -> Option<&[u8]> {
        self.transformed.clear();
        if self.encoder.encode(run, start, &mut self.transformed) == 0 || self.transformed.len() > largest(run.len()) {
            return None;
        }
        self.back.resize(run.len(), 0);
        self.decoder
            .decode(&self.transformed, &mut self.back, "a run of WAL")
            .ok()?;
        (self.back == run).then_some(&self.transformed)
    }
}
