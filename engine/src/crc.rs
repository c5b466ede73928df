//! CRC-32C of a whole from those of its parts. The `crc32c` crate does this too, in some twenty microseconds, which
//! is too long where an incremental backup has made parts of a file single pages.

/// Castagnoli's polynomial, reflected, without its highest term.
const POLYNOMIAL: u32 = 0x82F6_3B78;

/// x to the power of 2^n, modulo the polynomial.
const POWERS: [u32; 64] = {
    let mut powers = [0; 64];
    // x itself: bit 31 stands for 1.
    powers[0] = 1 << 30;
    let mut n = 1;
    while n < 64 {
        powers[n] = multiply(powers[n - 1], powers[n - 1]);
        n += 1;
    }
    powers
};

/// The product of two polynomials, modulo the polynomial.
const fn multiply(a: u32, mut b: u32) -> u32 {
    let (mut product, mut at) = (0, 1 << 31);
    while at != 0 {
        if a & at != 0 {
            product ^= b;
        }
        b = if b & 1 != 0 { (b >> 1) ^ POLYNOMIAL } else { b >> 1 };
        at >>= 1;
    }
    product
}

/// The CRC of a part with `first`, and behind it `len` bytes with `second`.
pub fn combine(first: u32, second: u32, len: u64) -> u32 {
    let mut shift = 1 << 31;
    for bit in 0..61 {
        if len >> bit & 1 != 0 {
            // Of so many bits: eight to a byte.
            shift = multiply(POWERS[bit + 3], shift);
        }
    }
    multiply(shift, first) ^ second
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn parts_make_the_whole(bytes in proptest::collection::vec(any::<u8>(), 0..20_000), cut in 0usize..20_000) {
            let (first, second) = bytes.split_at(cut.min(bytes.len()));
            let combined = super::combine(crc32c::crc32c(first), crc32c::crc32c(second), second.len() as u64);
            prop_assert_eq!(combined, crc32c::crc32c(&bytes));
        }

        #[test]
        fn long_parts_too(first: u32, second: u32, len in 0usize..1 << 40) {
            prop_assert_eq!(super::combine(first, second, len as u64), crc32c::crc32c_combine(first, second, len));
        }
    }
}
