//! A run of WAL into columns.

use std::collections::HashMap;

use super::classes::{Shape, Writing};
use super::images;
use super::scan::{Parts, Record, Scan};
use super::{
    CLASSES, LAYOUT, LONG_PAGE_HEADER, PAGE_HEADER, RECORD_HEADER, expected_header, header_len, u16_at, u64_at, xor,
};

/// Most bytes of the middle that become columns.
const LEAD: usize = 64;
/// Records of exactly one form that are worth a class, at least, and as a part of those that only differ in lengths.
const EXACT: (u32, u32) = (16, 8);
/// Records of one relation, and of any, that differ in lengths and are worth a class.
const OF_RELATION: u32 = 16;
const OF_ANY: u32 = 8;

/// What tells records of different classes apart, from the finest to the coarsest; 0 is no key.
type Keys = [u64; 3];

/// Takes runs apart; keeps its buffers from one to the next.
#[derive(Debug, Default)]
pub struct Encoder {
    scan: Scan,
    parts: Parts,
    keys: Vec<Keys>,
    /// Class of each record.
    ids: Vec<u16>,
    classes: Vec<Writing>,
    images: images::Writing,
    image_count: usize,
}

impl Encoder {
    /// Takes `plain` apart, whose first byte is at the LSN `start`; the result is appended to `out`. Returns how many
    /// records it has; without any, nothing is appended.
    pub fn encode(&mut self, plain: &[u8], start: u64, out: &mut Vec<u8>) -> usize {
        if u32::try_from(plain.len()).is_err() || self.scan.run(plain, start) == 0 {
            return 0;
        }
        self.classify();
        self.gather();
        self.write(plain, start, out);
        self.scan.records.len()
    }

    /// Finds classes, and which of them each record is of.
    fn classify(&mut self) {
        let Self { scan, parts, keys, .. } = self;
        let mut counts: HashMap<u64, u32> = HashMap::new();
        keys.clear();
        for record in &scan.records {
            let of_record = keys_of(record_bytes(scan, record), parts, scan.is_15);
            for key in of_record.into_iter().filter(|&key| key != 0) {
                *counts.entry(key).or_default() += 1;
            }
            keys.push(of_record);
        }
        self.ids.clear();
        self.classes.clear();
        let mut known: HashMap<u64, u16> = HashMap::new();
        for (number, [exact, of_relation, of_any]) in self.keys.iter().copied().enumerate() {
            let count = |key| counts.get(key).copied().unwrap_or_default();
            let key = match (count(&exact), count(&of_relation), count(&of_any)) {
                (n, all, _) if n >= EXACT.0 && n >= all / EXACT.1 => exact,
                (_, n, _) if n >= OF_RELATION => of_relation,
                (_, _, n) if n >= OF_ANY => of_any,
                _ => 0,
            };
            let key = if self.classes.len() < CLASSES - 1 || known.contains_key(&key) {
                key
            } else {
                0
            };
            let id = *known.entry(key).or_insert_with(|| {
                self.classes.push(Writing::default());
                (self.classes.len() - 1) as u16
            });
            self.ids.push(id);
            if key == 0 {
                continue;
            }
            let record = record_bytes(&self.scan, &self.scan.records[number]);
            self.parts.parse(&record[RECORD_HEADER..], self.scan.is_15);
            let shape = &mut self.classes[usize::from(id)].shape;
            match *shape == Shape::default() {
                true => *shape = shape_of(&self.parts),
                false => shape.lead = shape.lead.min(self.parts.middle),
            }
        }
    }

    /// Gives each class its rows and tails, and gathers images.
    fn gather(&mut self) {
        let Self {
            scan, parts, classes, ..
        } = self;
        self.images.clear();
        self.image_count = 0;
        let mut whole = None;
        let mut middle_buffer = Vec::new();
        for (record, id) in scan.records.iter().zip(&mut self.ids) {
            let record = record_bytes(scan, record);
            let body = &record[RECORD_HEADER..];
            let is_parsed = parts.parse(body, scan.is_15);
            if !is_parsed || !is_of(&classes[usize::from(*id)].shape, parts) {
                // Nothing is known of it: all of it is tail.
                *parts = Parts::default();
                parts.middle = body.len();
                if classes[usize::from(*id)].shape != Shape::default() {
                    *id = *whole.get_or_insert_with(|| {
                        let found = classes.iter().position(|class| class.shape == Shape::default());
                        found.unwrap_or_else(|| {
                            classes.push(Writing::default());
                            classes.len() - 1
                        }) as u16
                    });
                }
            }
            let Writing { shape, rows, tails } = &mut classes[usize::from(*id)];
            let (head, rest) = body.split_at(parts.head);
            let (rest, main) = rest.split_at(rest.len() - parts.main);
            let middle = match parts.images.is_empty() {
                true => rest,
                false => {
                    self.image_count += parts.images.len();
                    without_images(head, rest, parts, &mut self.images, &mut middle_buffer);
                    &middle_buffer
                }
            };
            let (lead, tail) = middle.split_at(shape.lead);
            rows.extend_from_slice(&record[4..8]);
            rows.extend_from_slice(&record[16..18]);
            if shape.fields.is_empty() {
                rows.extend_from_slice(&(tail.len() as u32).to_le_bytes());
            }
            rows.extend_from_slice(head);
            rows.extend_from_slice(lead);
            rows.extend_from_slice(main);
            tails.extend_from_slice(tail);
        }
    }

    fn write(&mut self, plain: &[u8], start: u64, out: &mut Vec<u8>) {
        let Scan {
            first, end, headers, ..
        } = &self.scan;
        let behind = &plain[*end..];
        let stored = behind.iter().rposition(|&byte| byte != 0).map_or(0, |last| last + 1);
        out.extend_from_slice(&[LAYOUT, 0, 0, 0]);
        out.extend_from_slice(&(*first as u32).to_le_bytes());
        out.extend_from_slice(&start.to_le_bytes());
        out.extend_from_slice(&self.scan.first_previous.to_le_bytes());
        for count in [stored, self.scan.records.len(), headers.len(), self.classes.len(), 0] {
            out.extend_from_slice(&(count as u32).to_le_bytes());
        }
        let mut planes = Vec::new();
        for class in &self.classes {
            class.write(out, &mut planes);
        }
        out.extend(self.ids.iter().map(|&id| id as u8));
        out.extend(self.ids.iter().map(|&id| (id >> 8) as u8));
        out.extend_from_slice(&plain[..*first]);
        out.extend_from_slice(&behind[..stored]);
        self.write_headers(plain, start, out);
        out.append(&mut planes);
        for class in &self.classes {
            out.extend_from_slice(&class.tails);
        }
        self.images.write(out);
    }

    /// Page headers, compared with what is expected, and what long ones have besides.
    fn write_headers(&self, plain: &[u8], start: u64, out: &mut Vec<u8>) {
        let (base, count) = (out.len(), self.scan.headers.len());
        out.resize(base + PAGE_HEADER * count, 0);
        let mut before = [0; PAGE_HEADER];
        let mut long = Vec::new();
        for (number, &(at, remaining)) in self.scan.headers.iter().enumerate() {
            let Some(header) = plain[at..].first_chunk() else {
                continue;
            };
            let expected = expected_header(&before, start.wrapping_add(at as u64), remaining);
            for (plane, byte) in xor(header, &expected).into_iter().enumerate() {
                out[base + plane * count + number] = byte;
            }
            if header_len(header) == LONG_PAGE_HEADER {
                long.extend_from_slice(&plain[at + PAGE_HEADER..at + LONG_PAGE_HEADER]);
            }
            before = *header;
        }
        out.append(&mut long);
    }
}

fn record_bytes<'a>(scan: &'a Scan, record: &Record) -> &'a [u8] {
    &scan.bytes[record.at..record.at + record.len]
}

/// The shape of a class with one record.
fn shape_of(parts: &Parts) -> Shape {
    Shape {
        head: parts.head,
        lead: parts.middle.min(LEAD),
        main: parts.main,
        images: parts.images.iter().map(|(image, _)| *image).collect(),
        fields: parts.fields.clone(),
    }
}

/// Whether a record can be of a class with this shape.
fn is_of(shape: &Shape, parts: &Parts) -> bool {
    shape.head == parts.head
        && shape.main == parts.main
        && shape.lead <= parts.middle
        && shape.fields == parts.fields
        && shape.images.iter().eq(parts.images.iter().map(|(image, _)| image))
        && shape.images.iter().all(|image| usize::from(image.before) <= shape.lead)
}

/// Splits images from what is between them, which goes to `middle`.
fn without_images(head: &[u8], rest: &[u8], parts: &Parts, images: &mut images::Writing, middle: &mut Vec<u8>) {
    middle.clear();
    let mut at = 0;
    for (image, is_compressed) in &parts.images {
        let until = at + usize::from(image.before) - middle.len();
        middle.extend_from_slice(&rest[at..until]);
        let header = &head[image.header.into()..];
        at = until + u16_at(header, 0);
        images.push(header, &rest[until..at], *is_compressed);
    }
    middle.extend_from_slice(&rest[at..]);
}

fn keys_of(record: &[u8], parts: &mut Parts, is_15: bool) -> Keys {
    let body = &record[RECORD_HEADER..];
    let is_parsed = parts.parse(body, is_15);
    if !is_parsed || parts.images.iter().any(|(image, _)| usize::from(image.before) > LEAD) {
        return [0; 3];
    }
    let mut of_any = mix(u16_at(record, 16) as u64, (parts.head as u64) << 32 | parts.main as u64);
    for (image, _) in &parts.images {
        of_any = mix(
            of_any,
            u64::from(image.header) << 16 | u64::from(image.before) | 1 << 32,
        );
    }
    for field in &parts.fields {
        of_any = mix(of_any, u64::from(field.at) << 8 | u64::from(field.width) | 2 << 32);
    }
    let of_relation = match parts.relation {
        None => of_any,
        Some(at) => mix(mix(of_any, u64_at(body, at)), u64_at(body, at + 4)),
    };
    let shape = Shape {
        fields: std::mem::take(&mut parts.fields),
        ..Shape::default()
    };
    let exact = mix(of_relation, shape.sum(body, 0).unwrap_or_default() as u64);
    parts.fields = shape.fields;
    [exact.max(1), of_relation.max(1), of_any.max(1)]
}

/// A hash of two numbers.
fn mix(a: u64, b: u64) -> u64 {
    let product = u128::from(a ^ 0x9e37_79b9_7f4a_7c15) * u128::from((b ^ a.rotate_left(23)) | 1 << 63);
    product as u64 ^ (product >> 64) as u64
}
