//! In builds with debug assertions only: signatures that were found good once are not computed again, since tests read the
//! same short logs thousands of times.
//!
//! What always holds: only what was found good is remembered, by a hash of key, signature and message.

use std::cell::RefCell;
use std::collections::HashSet;

use crate::sha256;

/// How many a thread keeps in mind.
const MOST: usize = 1 << 16;

thread_local! {
    static GOOD: RefCell<HashSet<[u8; 32]>> = RefCell::default();
}

/// What `is_good` says, unless it has said so before.
pub fn or_else(key: &[u8; 32], message: &[u8], signature: &[u8; 64], is_good: impl FnOnce() -> bool) -> bool {
    let hash = sha256(&[key.as_slice(), signature, message].concat());
    if GOOD.with_borrow(|good| good.contains(&hash)) {
        return true;
    }
    let found = is_good();
    if found {
        GOOD.with_borrow_mut(|good| {
            if good.len() >= MOST {
                good.clear();
            }
            good.insert(hash);
        });
    }
    found
}
