//! A block map: the blocks of main forks that a range of WAL changed.

use std::collections::{BTreeMap, BTreeSet};

/// A relation's files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RelationId {
    /// Tablespace.
    pub tablespace: u32,
    /// Database; 0 for shared relations.
    pub database: u32,
    /// Relation file number.
    pub relation: u32,
}

/// What changed in one relation's main fork.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Changes {
    /// The lowest length that it was given: every block from here on counts as changed.
    limit: Option<u32>,
    /// Blocks, 64 to a word.
    words: BTreeMap<u32, u64>,
}

impl Changes {
    /// A block changed.
    pub fn add(&mut self, block: u32) {
        *self.words.entry(block / 64).or_default() |= 1 << (block % 64);
    }

    /// The relation was made, dropped or cut at `block`.
    pub fn limit_to(&mut self, block: u32) {
        self.limit = Some(self.limit.map_or(block, |limit| limit.min(block)));
    }

    /// The lowest length that it was given.
    pub fn limit(&self) -> Option<u32> {
        self.limit
    }

    /// Whether a block counts as changed.
    pub fn has(&self, block: u32) -> bool {
        self.limit.is_some_and(|limit| block >= limit)
            || self
                .words
                .get(&(block / 64))
                .is_some_and(|word| word >> (block % 64) & 1 == 1)
    }

    /// Blocks that were named by WAL, ascending, from `from` on and below `to`.
    pub fn blocks(&self, from: u32, to: u32) -> impl Iterator<Item = u32> + '_ {
        let bits = |(&word, &bits): (&u32, &u64)| {
            let mut left = bits;
            std::iter::from_fn(move || {
                let bit = (left != 0).then(|| left.trailing_zeros())?;
                left &= left - 1;
                Some(word * 64 + bit)
            })
        };
        let end = to.max(from).div_ceil(64);
        self.words
            .range(from / 64..end)
            .flat_map(bits)
            .filter(move |&block| (from..to).contains(&block))
    }

    fn merge(&mut self, other: &Self) {
        if let Some(limit) = other.limit {
            self.limit_to(limit);
        }
        for (&word, &bits) in &other.words {
            *self.words.entry(word).or_default() |= bits;
        }
    }
}

/// What a range of WAL changed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BlockMap {
    relations: BTreeMap<RelationId, Changes>,
    /// Tablespace and database: made by copying files, or dropped. All of it counts as changed.
    databases: BTreeSet<(u32, u32)>,
    /// Everything counts as changed, and why.
    everything: Option<String>,
    /// Versions of the parsers that made it, as far as it was kept.
    parsers: BTreeSet<u32>,
}

impl BlockMap {
    /// The changes of a relation, to add to.
    pub fn relation(&mut self, id: RelationId) -> &mut Changes {
        self.relations.entry(id).or_default()
    }

    /// All of a database in a tablespace changed.
    pub fn database(&mut self, tablespace: u32, database: u32) {
        self.databases.insert((tablespace, database));
    }

    /// Nothing is known of what changed.
    pub fn everything(&mut self, why: impl Into<String>) {
        // A stored map tells this by its reason.
        let why = Some(why.into()).filter(|why| !why.is_empty());
        self.everything
            .get_or_insert_with(|| why.unwrap_or_else(|| "for no reason that is told".to_owned()));
    }

    /// Why nothing is known, if that is so.
    pub fn unknown(&self) -> Option<&str> {
        self.everything.as_deref()
    }

    /// A part of it was made by this version of the parser.
    pub fn made_by(&mut self, parser_version: u32) {
        self.parsers.insert(parser_version);
    }

    /// Versions of the parsers that made it, as far as it was kept, in order.
    pub fn parsers(&self) -> impl Iterator<Item = u32> {
        self.parsers.iter().copied()
    }

    /// Whether all of a relation's database changed.
    pub fn has_database(&self, id: RelationId) -> bool {
        self.databases.contains(&(id.tablespace, id.database))
    }

    /// What changed of a relation by itself.
    pub fn changes(&self, id: RelationId) -> Option<&Changes> {
        self.relations.get(&id)
    }

    /// All relations that changed by themselves, in order.
    pub fn relations(&self) -> impl Iterator<Item = (RelationId, &Changes)> {
        self.relations.iter().map(|(&id, changes)| (id, changes))
    }

    /// Tablespace and database of all that changed as a whole, in order.
    pub fn databases(&self) -> impl Iterator<Item = (u32, u32)> {
        self.databases.iter().copied()
    }

    /// Whether a block counts as changed.
    pub fn has(&self, id: RelationId, block: u32) -> bool {
        self.everything.is_some()
            || self.has_database(id)
            || self.relations.get(&id).is_some_and(|changes| changes.has(block))
    }

    /// Adds what another map says.
    pub fn merge(&mut self, other: &Self) {
        for (&id, changes) in &other.relations {
            self.relation(id).merge(changes);
        }
        self.databases.extend(&other.databases);
        self.parsers.extend(&other.parsers);
        if let Some(why) = &other.everything {
            self.everything(why);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ID: RelationId = RelationId {
        tablespace: 1663,
        database: 5,
        relation: 77,
    };

    proptest! {
        #[test]
        fn a_map_has_what_was_added_and_nothing_else(
            blocks in proptest::collection::btree_set(0u32..3000, 0..200),
            limit in proptest::option::of(0u32..3000),
            cut in 0usize..200,
            window in (0u32..3000, 0u32..3000),
        ) {
            let (mut first, mut second) = (BlockMap::default(), BlockMap::default());
            for (n, &block) in blocks.iter().enumerate() {
                let map = if n < cut { &mut first } else { &mut second };
                map.relation(ID).add(block);
            }
            if let Some(limit) = limit {
                second.relation(ID).limit_to(limit);
            }
            first.merge(&second);
            for block in 0..3000 {
                let expected = blocks.contains(&block) || limit.is_some_and(|limit| block >= limit);
                prop_assert_eq!(first.has(ID, block), expected);
            }
            let (from, to) = window;
            if let Some(changes) = first.changes(ID) {
                let listed: Vec<u32> = changes.blocks(from, to).collect();
                let expected: Vec<u32> = blocks.iter().copied().filter(|b| (from..to).contains(b)).collect();
                prop_assert_eq!(listed, expected);
            }
        }
    }

    #[test]
    fn the_lowest_limit_counts_and_doubt_covers_all() {
        let mut map = BlockMap::default();
        map.relation(ID).limit_to(9);
        map.relation(ID).limit_to(12);
        assert!(map.has(ID, 9) && !map.has(ID, 8));
        map.database(1663, 6);
        let of_database = RelationId { database: 6, ..ID };
        assert!(map.has(of_database, 0));
        let mut other = BlockMap::default();
        other.everything("because");
        map.merge(&other);
        assert!(map.has(ID, 0) && map.unknown() == Some("because"));
    }
}
