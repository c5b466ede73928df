//! CRC-32C of files that several backups have made: put together from the parts that were written or found right.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use super::plan::Plan;
use crate::crc::combine;
use crate::manifest::Placement;

/// A part of a file.
struct Part {
    file: u32,
    offset: u64,
    len: u32,
    crc: u32,
}

/// The parts of composed files, as they come.
#[derive(Default)]
pub struct Parts(Mutex<Vec<Part>>);

impl Parts {
    /// Takes a part of a file, if that is composed.
    pub fn add(&self, plan: &Plan, placement: &Placement, content: &[u8]) {
        if plan.files[placement.file as usize].composed {
            self.add_crc(placement, crc32c::crc32c(content));
        }
    }

    /// The same for one whose CRC is known.
    pub fn add_crc(&self, placement: &Placement, crc: u32) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(Part {
            file: placement.file,
            offset: placement.file_offset,
            len: placement.len,
            crc,
        });
    }

    /// The CRCs of whole files, by number. What no part covers is zero.
    pub fn finish(&self, plan: &Plan) -> HashMap<u32, u32> {
        let mut parts = std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner));
        parts.sort_unstable_by_key(|part| (part.file, part.offset));
        let composed = plan.files.iter().enumerate().filter(|(_, file)| file.composed);
        composed
            .map(|(number, file)| {
                let from = parts.partition_point(|part| (part.file as usize) < number);
                let to = parts.partition_point(|part| part.file as usize <= number);
                let (mut crc, mut at) = (0, 0);
                for part in &parts[from..to] {
                    crc = combine(zeros(crc, part.offset - at), part.crc, part.len.into());
                    at = part.offset + u64::from(part.len);
                }
                (number as u32, zeros(crc, file.size - at))
            })
            .collect()
    }
}

/// The CRC of what has `crc`, and `count` zeros behind it.
fn zeros(mut crc: u32, mut count: u64) -> u32 {
    const ZEROS: [u8; 8192] = [0; 8192];
    while count > 0 {
        let now = count.min(ZEROS.len() as u64);
        crc = crc32c::crc32c_append(crc, &ZEROS[..now as usize]);
        count -= now;
    }
    crc
}
