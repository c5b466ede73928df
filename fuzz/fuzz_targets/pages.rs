#![no_main]
//! Taking chunks apart and putting them together: what comes back is what went in; what nobody took apart is refused.
use fairvault_format::pages::{Decoder, Encoder, Masks, PAGE, Plan, overhead};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let [heap_words, item_words, fill, rest @ ..] = data else { return };
    // As a page or two: what the fuzzer gives goes to where the layout is, and to the end.
    let mut chunk = vec![*fill; PAGE * (1 + rest.len() / PAGE)];
    let half = rest.len() / 2;
    chunk[..half].copy_from_slice(&rest[..half]);
    let end = chunk.len() - (rest.len() - half);
    chunk[end..].copy_from_slice(&rest[half..]);
    let mut masks = Masks::default();
    masks.fixed.fill(*fill);
    masks.heap.fill(*heap_words);
    masks.items.fill(*item_words);
    let plan = Plan {
        heap_words: usize::from(*heap_words % 17),
        item_words: usize::from(*item_words % 17),
        masks,
    };
    let mut transformed = Vec::new();
    Encoder::default().encode(&chunk, &plan, &mut transformed);
    assert!(transformed.len() <= chunk.len() + overhead(chunk.len()));
    let mut back = vec![1; chunk.len()];
    Decoder::default()
        .decode(&transformed, &mut back, "a chunk")
        .expect("what was taken apart comes back");
    assert_eq!(back, chunk);
    // And as something that claims to have been taken apart.
    let _ = Decoder::default().decode(rest, &mut back, "a chunk");
});
