//! A directory repository that belongs to somebody else than root, while root writes into it: it is written as its
//! owner, who has to go on with it.
//!
//! What always holds: only where this process is root, and the folder somebody else's, is anything done here. A thread
//! of its own takes on the owner's rights and ends with them: nothing that it makes is root's for a moment, and links
//! that the owner plants lead it nowhere where the owner could not write. What the owner cannot write, root writes, as
//! it would without all this; that is said. Nothing changes hands after it was written, so no link makes root give
//! anything away.

use std::fmt::Display;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use object_store::path::Path;
use object_store::{PutOptions, PutPayload, PutResult};
use rustix::process::{Gid, Uid};

use super::{Client, Store};

/// The owner of a folder that root writes into.
#[derive(Debug, Clone)]
pub struct Owner {
    folder: PathBuf,
    /// It was said that root had to write.
    told: Arc<AtomicBool>,
}

impl Owner {
    /// The owner of a folder, if this process is root and the folder somebody else's.
    pub fn of(folder: &std::path::Path) -> Option<Self> {
        let this = Self {
            folder: folder.to_owned(),
            told: Arc::default(),
        };
        this.ids().map(|_| this)
    }

    /// User and group as they are now: another disk may be mounted there than before.
    fn ids(&self) -> Option<(Uid, Gid)> {
        if !rustix::process::geteuid().is_root() {
            return None;
        }
        let meta = std::fs::metadata(&self.folder).ok()?;
        // The highest number means "as it is" where rights are set.
        let is_somebody = meta.uid() != 0 && meta.uid() != u32::MAX && meta.gid() != u32::MAX;
        is_somebody.then(|| (Uid::from_raw(meta.uid()), Gid::from_raw(meta.gid())))
    }

    /// Does something as the owner. It blocks. `Err` says why it is left to root: rights could not be taken on, or it
    /// failed with an error that `is_for_root`.
    fn act<T: Send, E: Send + Display>(
        &self,
        work: impl FnOnce() -> Result<T, E> + Send,
        is_for_root: impl Fn(&E) -> bool,
    ) -> Result<Result<T, E>, String> {
        let ids = self.ids();
        let acted = std::thread::scope(|scope| -> io::Result<Result<T, E>> {
            let as_owner = move || {
                if let Some((uid, gid)) = ids {
                    take_on(uid, gid)?;
                }
                io::Result::Ok(work())
            };
            let thread = std::thread::Builder::new().name("owner".to_owned());
            let thread = thread.spawn_scoped(scope, as_owner)?;
            thread
                .join()
                .unwrap_or_else(|_| Err(io::Error::other("the thread panicked")))
        });
        match acted {
            Ok(Err(error)) if is_for_root(&error) => Err(error.to_string()),
            Ok(done) => Ok(done),
            Err(error) => Err(error.to_string()),
        }
    }

    /// Says once that root had to write.
    fn tell(&self, why: &str) {
        if self.told.swap(true, Ordering::Relaxed) {
            return;
        }
        tracing::warn!(
            "below {}, root has written what the owner of that folder could not write: {why}. What is root's there may \
             stop the owner: `chown -R` gives it back",
            self.folder.display()
        );
    }
}

/// Gives this thread the rights of a user and a group at files, and takes root's. Other threads keep theirs.
#[cfg(target_os = "linux")]
fn take_on(uid: Uid, gid: Gid) -> io::Result<()> {
    use rustix::thread::{
        CapabilitySet, capabilities, set_capabilities, set_thread_groups, set_thread_res_gid, set_thread_res_uid,
    };
    set_thread_groups(&[])?;
    set_thread_res_gid(None::<Gid>, Some(gid), None::<Gid>)?;
    // Only the effective one: with the others, that user could send signals to this process.
    set_thread_res_uid(None::<Uid>, Some(uid), None::<Uid>)?;
    // The way to the folder may be open to the owner through groups that are not known here. This opens folders and
    // lets read, and lets nothing be written.
    let mut held = capabilities(None)?;
    held.effective = held.permitted & CapabilitySet::DAC_READ_SEARCH;
    set_capabilities(None, held)?;
    Ok(())
}

#[cfg(not(target_os = "linux"))]
fn take_on(_: Uid, _: Gid) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}

/// Writes into a folder, as its owner where there is one. It blocks. `work` is done a second time, by root, after an
/// error that `is_for_root`.
pub fn write<T: Send, E: Send + Display>(
    owner: Option<&Owner>,
    work: impl Fn() -> Result<T, E> + Sync,
    is_for_root: impl Fn(&E) -> bool,
) -> Result<T, E> {
    let Some(owner) = owner else {
        return work();
    };
    let why = match owner.act(&work, is_for_root) {
        Ok(done) => return done,
        Err(why) => why,
    };
    let done = work()?;
    owner.tell(&why);
    Ok(done)
}

impl Store {
    /// As whom to write into a folder inside of this repository, if not as who this process is. A folder that is not
    /// there yet will be of the repository's owner.
    pub(crate) fn owner_of(&self, folder: &std::path::Path) -> Option<Owner> {
        let root = self.settings.root.as_ref()?;
        if !folder.starts_with(&root.path) {
            return None;
        }
        match folder.is_dir() {
            true => Owner::of(folder),
            false => root.owner.clone(),
        }
    }

    /// Uploads an object: no other way leads into a repository.
    pub(super) async fn upload(
        &self,
        client: &Client,
        path: &Path,
        payload: PutPayload,
        options: PutOptions,
    ) -> object_store::Result<PutResult> {
        let owner = self.settings.root.as_ref().and_then(|root| root.owner.clone());
        let Some(owner) = owner else {
            return client.put_opts(path, payload, options).await;
        };
        let work = {
            let (owner, client, path) = (owner.clone(), client.clone(), path.clone());
            let (payload, options) = (payload.clone(), options.clone());
            move || {
                // Away from the runtime, the client of a folder does its work on the thread that asks for it.
                let put = || futures::executor::block_on(client.put_opts(&path, payload, options));
                // Whether a name is free is no question of rights.
                owner.act(put, super::is_permission_io)
            }
        };
        let why = match tokio::task::spawn_blocking(work).await? {
            Ok(done) => return done,
            Err(why) => why,
        };
        let done = client.put_opts(path, payload, options).await?;
        owner.tell(&why);
        Ok(done)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::collections::BTreeSet;
    use std::os::unix::fs::{PermissionsExt, chown, symlink};

    use super::*;
    use crate::store::Created;
    use crate::store::url::RepositoryUrl;

    /// User and group of the repositories here, two numbers that nobody takes for each other.
    pub(crate) const SOMEBODY: (u32, u32) = (65_534, 65_533);

    /// A repository that belongs to somebody else, in a folder that is closed to that user; `None` without the
    /// right to make one.
    pub(crate) fn somebodys() -> Option<(tempfile::TempDir, Store)> {
        if !rustix::process::geteuid().is_root() {
            eprintln!("only root can write as somebody else");
            return None;
        }
        let folder = tempfile::tempdir().unwrap();
        let vault = folder.path().join("vault");
        make(&vault, 0o700);
        let url = RepositoryUrl {
            url: format!("file://{}", vault.display()),
            ..RepositoryUrl::default()
        };
        Some((folder, url.open(false).unwrap()))
    }

    /// A folder of that user.
    fn make(folder: &std::path::Path, mode: u32) {
        std::fs::create_dir(folder).unwrap();
        std::fs::set_permissions(folder, std::fs::Permissions::from_mode(mode)).unwrap();
        chown(folder, Some(SOMEBODY.0), Some(SOMEBODY.1)).unwrap();
    }

    /// Everybody to whom something in a folder belongs, and how many files there are.
    pub(crate) fn owners(folder: &std::path::Path) -> (Vec<(u32, u32)>, usize) {
        let (mut all, mut files) = (BTreeSet::new(), 0);
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let meta = std::fs::symlink_metadata(&path).unwrap();
            all.insert((meta.uid(), meta.gid()));
            if meta.is_dir() {
                let (below, more) = owners(&path);
                all.extend(below);
                files += more;
            } else {
                files += 1;
            }
        }
        (all.into_iter().collect(), files)
    }

    #[tokio::test]
    async fn what_root_writes_belongs_to_the_owner_of_the_folder() {
        let Some((folder, store)) = somebodys() else { return };
        let stanza = store.folder("acme");
        let created = stanza.create("log/0/1", "one".into(), 10).await.unwrap();
        assert_eq!(created, Created::Won);
        let created = stanza.create("log/0/1", "other".into(), 10).await.unwrap();
        assert_eq!(created, Created::Lost("one".into()));
        let created = stanza.create_large("log/0/1", "one".into(), 2).await.unwrap();
        assert_eq!(created, Created::Won);
        stanza.put_hashed("packs/ab/x", "pack".into()).await.unwrap();
        for lease in ["first", "second"] {
            stanza.replace("leases/l", lease.into()).await.unwrap();
        }
        assert_eq!(stanza.get("leases/l", 10).await.unwrap(), "second");
        assert_eq!(owners(&folder.path().join("vault")), (vec![SOMEBODY], 3));
    }

    /// Whose the folder is counts when something is written.
    #[tokio::test]
    async fn a_folder_that_was_given_to_root_is_roots() {
        let Some((folder, store)) = somebodys() else { return };
        let vault = folder.path().join("vault");
        chown(&vault, Some(0), Some(0)).unwrap();
        store.put_hashed("a/b", "x".into()).await.unwrap();
        assert_eq!(owners(&vault), (vec![(0, 0)], 1));
        assert!(Owner::of(&vault).is_none());
    }

    #[tokio::test]
    async fn links_that_the_owner_plants_give_nothing_away() {
        let Some((folder, store)) = somebodys() else { return };
        let (vault, roots) = (folder.path().join("vault"), folder.path().join("roots"));
        std::fs::create_dir(&roots).unwrap();
        std::fs::set_permissions(&roots, std::fs::Permissions::from_mode(0o755)).unwrap();
        let secret = roots.join("secret");
        std::fs::write(&secret, "secret").unwrap();
        make(&vault.join("leases"), 0o755);
        symlink(&secret, vault.join("leases/soft")).unwrap();
        std::fs::hard_link(&secret, vault.join("leases/hard")).unwrap();
        for name in ["leases/soft", "leases/hard"] {
            store.replace(name, "lease".into()).await.unwrap();
            let meta = std::fs::symlink_metadata(vault.join(name)).unwrap();
            assert!(meta.is_file());
            assert_eq!((meta.uid(), meta.gid()), SOMEBODY);
        }
        // Behind a folder that is none: root writes, as it always did, and nothing changes hands.
        symlink(&roots, vault.join("snapshots")).unwrap();
        store.replace("snapshots/s", "snapshot".into()).await.unwrap();
        assert_eq!(std::fs::read(roots.join("s")).unwrap(), b"snapshot");
        assert_eq!(std::fs::read(&secret).unwrap(), b"secret");
        assert_eq!(owners(&roots), (vec![(0, 0)], 2));
        assert_eq!(std::fs::metadata(&roots).unwrap().uid(), 0);
    }

    #[tokio::test]
    async fn what_the_owner_may_not_write_is_written_all_the_same() {
        let Some((folder, store)) = somebodys() else { return };
        let before = folder.path().join("vault/before");
        std::fs::create_dir(&before).unwrap();
        std::fs::set_permissions(&before, std::fs::Permissions::from_mode(0o755)).unwrap();
        for outcome in [Created::Won, Created::Lost("x".into())] {
            let ours = if outcome == Created::Won { "x" } else { "y" };
            let created = store.create("before/a", ours.into(), 10).await.unwrap();
            assert_eq!(created, outcome);
        }
        assert_eq!(owners(&before), (vec![(0, 0)], 1));
    }

    #[test]
    fn the_owner_has_no_rights_of_root_and_leaves_root_its_own() {
        let Some((folder, store)) = somebodys() else { return };
        let (vault, other) = (folder.path().join("vault"), folder.path().join("other"));
        let owner = store.owner_of(&vault).unwrap();
        let all = |_: &io::Error| true;
        let why = owner.act(|| std::fs::write(&other, "x"), all).unwrap_err();
        assert!(why.contains("denied"), "{why}");
        assert!(!other.exists());
        owner
            .act(|| std::fs::write(vault.join("x"), "x"), all)
            .unwrap()
            .unwrap();
        assert_eq!(owners(&vault), (vec![SOMEBODY], 1));
        // Nobody else's rights have changed.
        assert!(rustix::process::geteuid().is_root());
        std::fs::write(&other, "x").unwrap();
        assert_eq!(std::fs::metadata(&other).unwrap().uid(), 0);
        // Outside of the repository, it is nobody's business here.
        assert!(store.owner_of(folder.path()).is_none());
    }
}
