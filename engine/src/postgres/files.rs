//! What the names of files in a data directory mean: which have checksummed pages, and of which relation.

/// A fork of a relation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Fork {
    /// The relation itself.
    Main,
    /// Free space map.
    Fsm,
    /// Visibility map.
    Vm,
    /// Initial contents of an unlogged relation.
    Init,
}

impl Fork {
    /// Its number, as WAL has it.
    pub fn number(self) -> u8 {
        match self {
            Self::Main => 0,
            Self::Fsm => 1,
            Self::Vm => 2,
            Self::Init => 3,
        }
    }
}

/// A relation file, by its path in the data directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct RelationFile {
    /// Tablespace; 1664 is pg_global, 1663 pg_default.
    pub tablespace: u32,
    /// Database; 0 for shared relations.
    pub database: u32,
    /// Relation file number.
    pub relation: u32,
    /// Fork.
    pub fork: Fork,
    /// Segment number: blocks of the file begin at `segment` × blocks per segment.
    pub segment: u32,
}

/// Reads a path such as `base/5/1234_fsm.2` or `pg_tblspc/16400/PG_15_202209061/5/1234`. `None` if it is
/// no relation file.
pub fn relation_file(path: &str) -> Option<RelationFile> {
    let parts: Vec<&str> = path.split('/').collect();
    let (tablespace, database, file) = match parts.as_slice() {
        ["global", file] => (1664, 0, *file),
        ["base", database, file] => (1663, number(database)?, *file),
        ["pg_tblspc", oid, version, database, file] if version.starts_with("PG_") => {
            (number(oid)?, number(database)?, *file)
        }
        _ => return None,
    };
    let (name, segment) = match file.split_once('.') {
        Some((name, segment)) => (name, number(segment)?),
        None => (file, 0),
    };
    let (relation, fork) = match name.split_once('_') {
        None => (name, Fork::Main),
        Some((relation, "fsm")) => (relation, Fork::Fsm),
        Some((relation, "vm")) => (relation, Fork::Vm),
        Some((relation, "init")) => (relation, Fork::Init),
        Some(_) => return None,
    };
    Some(RelationFile {
        tablespace,
        database,
        relation: number(relation)?,
        fork,
        segment,
    })
}

fn number(digits: &str) -> Option<u32> {
    (!digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit()))
        .then(|| digits.parse().ok())
        .flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_understood() {
        let file = relation_file("base/5/1234_vm.3").unwrap();
        assert_eq!(
            (file.tablespace, file.database, file.relation, file.fork, file.segment),
            (1663, 5, 1234, Fork::Vm, 3)
        );
        assert_eq!(relation_file("global/1262").unwrap().tablespace, 1664);
        assert_eq!(
            relation_file("pg_tblspc/16400/PG_15_202209061/5/77").unwrap().relation,
            77
        );
        for path in [
            "base/5/PG_VERSION",
            "global/pg_control",
            "base/5/pg_filenode.map",
            "base/5/t3_123",
            "pg_xact/0000",
            "base/5/12.x",
        ] {
            assert!(relation_file(path).is_none(), "{path}");
        }
    }
}
