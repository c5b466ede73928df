//! The choice for chunks that look like a sample: each way of taking pages apart is tried on a few of them.

use fairvault_format::pages::{Encoder, PAGE, Plan};
use zstd::bulk::Compressor;
use zstd::zstd_safe::compress_bound;

/// Pages in a sample.
const SAMPLE_PAGES: usize = 12;
/// Columns that are tried: words of a heap tuple's body, and of other items.
const WORDS: [usize; 4] = [8, 4, 2, 0];
/// What is tried with a few pages, where trying costs more than it can bring.
const WORDS_OF_FEW: [usize; 1] = [4];
/// That few.
const FEW_PAGES: usize = 6;

/// How to compress.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Choice {
    /// As it is.
    Plain,
    /// Taken apart.
    Pages(Plan),
}

/// The smallest.
pub fn choose(zstd: &mut Compressor<'_>, encoder: &mut Encoder, plain: &[u8]) -> Choice {
    let sample = sample(plain);
    let mut packed = vec![0; compress_bound(sample.len() + fairvault_format::pages::overhead(sample.len()))];
    let mut size = |bytes: &[u8]| zstd.compress_to_buffer(bytes, &mut packed[..]).unwrap_or(usize::MAX);
    let mut best = (size(&sample), Choice::Plain);
    let mut transformed = Vec::new();
    let proposed = encoder.propose(&sample, WORDS[0], WORDS[0]);
    let words = match sample.len() / PAGE {
        ..FEW_PAGES => &WORDS_OF_FEW[..],
        _ => &WORDS[..],
    };
    for &words in words {
        let plan = Plan {
            heap_words: words,
            item_words: words,
            ..proposed
        };
        transformed.clear();
        if encoder.encode(&sample, &plan, &mut transformed) == 0 {
            break;
        }
        let size = size(&transformed);
        if size < best.0 {
            best = (size, Choice::Pages(plan));
        }
    }
    best.1
}

/// A few pages from all over, in runs, so that neighbours can be compared.
fn sample(plain: &[u8]) -> Vec<u8> {
    const RUN: usize = 4;
    let pages = plain.as_chunks::<PAGE>().0;
    if pages.len() <= SAMPLE_PAGES {
        return pages.as_flattened().to_vec();
    }
    let runs = SAMPLE_PAGES / RUN;
    let step = (pages.len() - RUN) / (runs - 1);
    (0..runs)
        .flat_map(|run| pages[run * step..run * step + RUN].as_flattened())
        .copied()
        .collect()
}
