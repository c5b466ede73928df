//! What each part of the page codec is worth, in bytes: what is left of files of relations at zstd level 1 if words of
//! tuples and items become columns or not, and planes hold differences or not.
//!
//! `cargo run --release -p fairvault-benches --example sizes -- FILE...`

use fairvault_benches::CHUNK;
use fairvault_engine::codec::{Codec, Content};
use fairvault_format::frame::FRAME_HEADER_LEN;
use fairvault_format::pages::{Encoder, Masks, Plan};

/// Words that become columns.
const WORDS: [usize; 5] = [0, 2, 4, 8, 16];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!(
        "| file | MiB | zstd 1 | zstd 3 | words: 0 | 2 | 4 | 8 | 16 \
         | without differences: 0 | 2 | 4 | 8 | 16 | as chosen |"
    );
    println!("{}|", "|---".repeat(15));
    for path in std::env::args().skip(1) {
        let content = std::fs::read(&path)?;
        let sizes = sizes(&content)?;
        print!("| {path} | {:.1} |", content.len() as f64 / f64::from(1 << 20));
        // How many times smaller.
        for size in sizes {
            print!(" {:.2} |", content.len() as f64 / size.max(1) as f64);
        }
        println!();
    }
    Ok(())
}

/// Bytes that each way leaves, in the order of the table.
fn sizes(content: &[u8]) -> Result<Vec<usize>, Box<dyn std::error::Error>> {
    let [mut fast, mut slow] = [zstd::bulk::Compressor::new(1)?, zstd::bulk::Compressor::new(3)?];
    let (mut codec, mut encoder, mut out) = (Codec::new(1)?, Encoder::default(), Vec::new());
    let mut sizes = vec![0; 3 + 2 * WORDS.len()];
    for chunk in content.chunks(CHUNK) {
        let mut left = vec![fast.compress(chunk)?.len(), slow.compress(chunk)?.len()];
        for differences in [true, false] {
            for words in WORDS {
                let proposed = encoder.propose(chunk, words, words);
                let masks = match differences {
                    true => proposed.masks,
                    false => Masks::default(),
                };
                out.clear();
                encoder.encode(chunk, &Plan { masks, ..proposed }, &mut out);
                left.push(fast.compress(&out)?.len());
            }
        }
        let (_, frame) = codec.encode(chunk, Content::Pages { file: 1 });
        left.push(frame.len() - FRAME_HEADER_LEN);
        sizes.iter_mut().zip(left).for_each(|(all, left)| *all += left);
    }
    Ok(sizes)
}
