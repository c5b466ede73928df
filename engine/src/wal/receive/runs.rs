//! Bytes of a segment in runs of the length in which they are sealed: each is let go of as soon as it was.

use std::collections::VecDeque;
use std::ops::Range;

use fairvault_format::limits;

/// Bytes of a run.
const RUN: usize = limits::WAL_SECTION_BYTES;

/// Bytes that are appended at the end, and let go of from the beginning.
#[derive(Debug, Default)]
pub struct Runs {
    runs: VecDeque<Vec<u8>>,
    /// Bytes of the first run that were let go of.
    gone: usize,
    len: usize,
}

impl Runs {
    /// Bytes that are held.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Appends bytes.
    pub fn extend(&mut self, mut bytes: &[u8]) {
        self.len += bytes.len();
        while !bytes.is_empty() {
            if self.runs.back().is_none_or(|last| last.len() == RUN) {
                self.runs.push_back(Vec::with_capacity(RUN));
            }
            let Some(last) = self.runs.back_mut() else { return };
            let (now, later) = bytes.split_at(bytes.len().min(RUN - last.len()));
            last.extend_from_slice(now);
            bytes = later;
        }
    }

    /// Lets go of the first `count` bytes.
    pub fn let_go(&mut self, count: usize) {
        let count = count.min(self.len);
        self.len -= count;
        self.gone += count;
        while self.gone >= RUN && self.runs.pop_front().is_some() {
            self.gone -= RUN;
        }
    }

    /// A copy of some of the bytes that are held; as far as they are.
    pub fn copy(&self, range: Range<usize>) -> Vec<u8> {
        let (mut from, to) = (range.start + self.gone, range.end.min(self.len) + self.gone);
        let mut out = Vec::with_capacity(to.saturating_sub(from));
        while from < to {
            let end = to.min((from / RUN + 1) * RUN);
            let base = from / RUN * RUN;
            out.extend_from_slice(&self.runs[from / RUN][from - base..end - base]);
            from = end;
        }
        out
    }

    /// The runs themselves, if nothing was let go of.
    pub fn into_runs(self) -> VecDeque<Vec<u8>> {
        debug_assert_eq!(self.gone, 0);
        self.runs
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_held_is_what_was_appended() {
        let all: Vec<u8> = (0..2 * RUN + 1234).map(|n| (n / 7) as u8).collect();
        let mut runs = Runs::default();
        for part in all.chunks(99_991) {
            runs.extend(part);
        }
        assert_eq!(runs.len(), all.len());
        assert_eq!(runs.copy(0..all.len()), all);
        for range in [0..1, RUN - 1..RUN + 1, RUN..2 * RUN, 10..2 * RUN + 5, 5..5] {
            assert_eq!(runs.copy(range.clone()), all[range]);
        }
        assert_eq!(runs.copy(all.len() - 3..all.len() + 9), all[all.len() - 3..]);
        let mut gone = 0;
        for count in [1, RUN - 1, 3, RUN] {
            runs.let_go(count);
            gone += count;
            assert_eq!(runs.len(), all.len() - gone);
            assert_eq!(runs.copy(0..runs.len()), all[gone..]);
        }
        runs.let_go(usize::MAX);
        assert_eq!((runs.len(), runs.copy(0..9)), (0, Vec::new()));
    }
}
