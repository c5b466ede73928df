//! Columns of manifests: frame tables and extents as they are stored (SPEC.md, section 6), and as everybody uses them.
//!
//! Mostly a frame follows on the one before, and an extent on the extent before. What is stored says only where that is
//! not so: it compresses to little, and what changes in one place leaves what is stored of all others as it is, for the
//! next backup to share.
//!
//! What always holds: columns come back as they were; those that do not fit together are damage.

use prost::Message;

use crate::error::{FormatError, Result};
use crate::proto::{Extents, FrameTable, ManifestSegment};

/// What a number is beyond the one that was expected.
fn step(number: u32, expected: u32) -> i32 {
    number.wrapping_sub(expected) as i32
}

/// The number that is a step beyond the one that was expected.
fn stepped(expected: u32, step: i32) -> u32 {
    expected.wrapping_add_signed(step)
}

/// Makes a frame table relative.
pub fn relative_frames(table: &mut FrameTable) {
    let mut expected = 0u32;
    for ordinal in std::mem::take(&mut table.ordinal) {
        table.ordinal_step.push(step(ordinal, expected));
        expected = ordinal.wrapping_add(1);
    }
    expected = 0;
    for (offset, stored_len) in std::mem::take(&mut table.offset).into_iter().zip(&table.stored_len) {
        table.offset_step.push(step(offset, expected));
        expected = offset.wrapping_add(*stored_len);
    }
}

/// Makes a frame table absolute, whichever it is. Its columns may still differ in length.
pub fn absolute_frames(table: &mut FrameTable, what: &str) -> Result<()> {
    only_one(&table.ordinal, &table.ordinal_step, what)?;
    only_one(&table.offset, &table.offset_step, what)?;
    // Where the steps of offsets lead depends on lengths: more of them would get lost.
    if !table.offset_step.is_empty() && table.offset_step.len() != table.stored_len.len() {
        return Err(FormatError::damaged(
            what,
            "the columns of its frame table differ in length",
        ));
    }
    let mut expected = 0u32;
    for by in std::mem::take(&mut table.ordinal_step) {
        let ordinal = stepped(expected, by);
        table.ordinal.push(ordinal);
        expected = ordinal.wrapping_add(1);
    }
    expected = 0;
    for (by, stored_len) in std::mem::take(&mut table.offset_step)
        .into_iter()
        .zip(&table.stored_len)
    {
        let offset = stepped(expected, by);
        table.offset.push(offset);
        expected = offset.wrapping_add(*stored_len);
    }
    Ok(())
}

fn only_one<T, S>(column: &[T], steps: &[S], what: &str) -> Result<()> {
    match column.is_empty() || steps.is_empty() {
        true => Ok(()),
        false => Err(FormatError::damaged(what, "it has a column both as it is and in steps")),
    }
}

/// Encodes a manifest segment whose columns are absolute.
pub fn encode_segment(mut segment: ManifestSegment) -> Vec<u8> {
    if let Some(frames) = &mut segment.frames {
        relative_frames(frames);
    }
    let mut expected = 0u32;
    for extents in segment.files.iter_mut().filter_map(|file| file.extents.as_mut()) {
        if follow_each_other(extents) {
            extents.file_offset.clear();
        }
        for frame in std::mem::take(&mut extents.frame) {
            extents.frame_step.push(step(frame, expected));
            expected = frame.wrapping_add(1);
        }
    }
    segment.encode_to_vec()
}

/// Whether the extents cover a file from its beginning, without a gap.
fn follow_each_other(extents: &Extents) -> bool {
    let mut end = 0u64;
    extents.file_offset.len() == extents.len.len()
        && extents.file_offset.iter().zip(&extents.len).all(|(offset, len)| {
            let follows = *offset == end;
            end = offset.saturating_add((*len).into());
            follows
        })
}

/// Decodes a manifest segment, and makes its columns absolute, whichever they are. They may still differ in length.
pub fn decode_segment(bytes: &[u8], what: &str) -> Result<ManifestSegment> {
    let mut segment = ManifestSegment::decode(bytes).map_err(|error| FormatError::damaged(what, error.to_string()))?;
    absolute(&mut segment, what)?;
    Ok(segment)
}

/// Makes the columns of a manifest segment absolute, whichever they are.
fn absolute(segment: &mut ManifestSegment, what: &str) -> Result<()> {
    if let Some(frames) = &mut segment.frames {
        absolute_frames(frames, what)?;
    }
    let mut expected = 0u32;
    for extents in segment.files.iter_mut().filter_map(|file| file.extents.as_mut()) {
        if extents.file_offset.is_empty() {
            let mut end = 0u64;
            extents.file_offset.extend(extents.len.iter().map(|len| {
                let offset = end;
                end += u64::from(*len);
                offset
            }));
        }
        only_one(&extents.frame, &extents.frame_step, what)?;
        for by in std::mem::take(&mut extents.frame_step) {
            let frame = stepped(expected, by);
            extents.frame.push(frame);
            expected = frame.wrapping_add(1);
        }
        if let Some(last) = extents.frame.last() {
            expected = last.wrapping_add(1);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::FileEntry;

    fn dice(seed: u64) -> impl FnMut(u32) -> u32 {
        let mut state = seed;
        move |below| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            ((state >> 33) as u32).checked_rem(below).unwrap_or(state as u32)
        }
    }

    /// `odd` of a hundred numbers are any numbers, 0 for one that may be anything at all.
    fn segment(seed: u64, odd: u32) -> ManifestSegment {
        let mut roll = dice(seed);
        let mut frames = FrameTable::default();
        for number in 0..roll(200) {
            let other = |usual: u32, roll: &mut dyn FnMut(u32) -> u32| match roll(100) < odd {
                true => roll(0),
                false => usual,
            };
            let end = frames.offset.last().zip(frames.stored_len.last());
            let end = end.map_or(80, |(offset, len)| u32::wrapping_add(*offset, *len));
            frames.ids.extend([number as u8; 32]);
            frames.pack.push(0);
            frames.ordinal.push(other(number, &mut roll));
            frames.offset.push(other(end, &mut roll));
            frames.stored_len.push(other(3000, &mut roll));
            frames.plain_len.push(8192);
        }
        let mut next = 0u32;
        let mut file = |number: u32| {
            let mut extents = Extents::default();
            let mut end = 0u64;
            let is_regular = !number.is_multiple_of(3);
            for _ in 0..if is_regular { roll(5) } else { 0 } {
                let gap = if roll(100) < odd { roll(0).into() } else { 0 };
                let frame = if roll(100) < odd { roll(0) } else { next };
                extents.file_offset.push(end + gap);
                extents.len.push(roll(1 << 19));
                end += gap + u64::from(extents.len[extents.len.len() - 1]);
                extents.frame.push(frame);
                next = frame.wrapping_add(1);
                extents.frame_offset.push(roll(1 << 19));
            }
            FileEntry {
                path: format!("base/5/{number}"),
                extents: is_regular.then_some(extents),
                ..Default::default()
            }
        };
        ManifestSegment {
            pack_names: vec![vec![7; 32]],
            files: (0..40).map(&mut file).collect(),
            frames: Some(frames),
        }
    }

    #[test]
    fn columns_come_back_whichever_they_are() {
        for seed in 0..300 {
            let segment = segment(seed, [0, 5, 100][seed as usize % 3]);
            let stored = encode_segment(segment.clone());
            assert_eq!(decode_segment(&stored, "a segment").unwrap(), segment, "seed {seed}");
            // What was absolute stays so.
            let absolute = segment.encode_to_vec();
            assert_eq!(decode_segment(&absolute, "a segment").unwrap(), segment, "seed {seed}");
        }
    }

    /// What follows on what was before is zeros, or nothing; what changes in one place changes the next place at most.
    #[test]
    fn what_follows_on_what_was_before_says_nothing() {
        let mut segment = segment(1, 0);
        let stored = ManifestSegment::decode(encode_segment(segment.clone()).as_slice()).unwrap();
        let frames = stored.frames.unwrap();
        assert!(frames.ordinal_step.len() > 20 && frames.ordinal.is_empty() && frames.offset.is_empty());
        assert!(frames.ordinal_step.iter().all(|step| *step == 0));
        assert!(frames.offset_step[0] == 80 && frames.offset_step[1..].iter().all(|step| *step == 0));
        let steps = |files: &[FileEntry]| -> Vec<i32> {
            let extents = files.iter().filter_map(|file| file.extents.as_ref());
            extents
                .flat_map(|extents| {
                    assert!(extents.frame.is_empty() && extents.file_offset.is_empty());
                    extents.frame_step.clone()
                })
                .collect()
        };
        let before = steps(&stored.files);
        assert!(before.len() > 20 && before.iter().all(|step| *step == 0));
        let mut extents = segment.files.iter_mut().filter_map(|file| file.extents.as_mut());
        let changed = extents.find_map(|extents| extents.frame.last_mut()).unwrap();
        *changed += 90;
        let stored = ManifestSegment::decode(encode_segment(segment).as_slice()).unwrap();
        let after: Vec<i32> = steps(&stored.files).into_iter().filter(|step| *step != 0).collect();
        assert_eq!(after, [90, -90]);
    }

    #[test]
    fn a_column_that_is_there_twice_is_damage() {
        let refused = |damage: fn(&mut ManifestSegment)| {
            let mut segment = segment(2, 0);
            damage(&mut segment);
            let error = decode_segment(&segment.encode_to_vec(), "a segment").unwrap_err();
            assert!(error.to_string().contains("both as it is and in steps"), "{error}");
        };
        refused(|segment| segment.frames.as_mut().unwrap().ordinal_step.push(0));
        refused(|segment| segment.frames.as_mut().unwrap().offset_step.push(0));
        refused(|segment| {
            let extents = segment.files.iter_mut().filter_map(|file| file.extents.as_mut());
            extents.for_each(|extents| extents.frame_step.push(0));
        });
        assert!(decode_segment(&[0xff; 9], "a segment").is_err());
    }

    #[test]
    fn steps_that_are_not_as_many_as_frames_are_damage() {
        let stored = encode_segment(segment(1, 0));
        let is_refused = |damage: fn(&mut FrameTable)| {
            let mut segment = ManifestSegment::decode(stored.as_slice()).unwrap();
            damage(segment.frames.as_mut().unwrap());
            decode_segment(&segment.encode_to_vec(), "a segment").is_err()
        };
        assert!(!is_refused(|_| ()));
        assert!(is_refused(|frames| frames.offset_step.push(0)));
        assert!(is_refused(|frames| frames.offset_step.truncate(1)));
    }
}
