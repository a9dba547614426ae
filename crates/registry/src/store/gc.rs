//! Collection: what no tag, no caller and no recent use holds on to goes.

use super::files::list;
use super::{ContentStore, DAMAGED_KEPT, GC_GRACE, StoreError, clean};
use crate::digest::{Digest, Repo};
use crate::manifest::Manifest;
use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::time::{Duration, SystemTime};

/// An index of indexes of indexes is an attack.
const MAX_DEPTH: usize = 4;

/// What a collection removed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Gc {
    pub blobs_removed: u64,
    pub bytes_freed: u64,
    pub manifests_removed: u64,
}

impl ContentStore {
    /// Removes content that no tag reaches, that is not (part of) one of the manifests `keep`, and that nobody
    /// asked about during the last hour. What `keep` names stays even when its repository lost it: a deleted
    /// manifest may be what machines run. Uploads that were given up, and damaged content after a week, go as well.
    pub fn gc(&self, keep: &[Digest]) -> Result<Gc, StoreError> {
        self.gc_older_than(keep, GC_GRACE)
    }

    pub fn gc_older_than(&self, keep: &[Digest], grace: Duration) -> Result<Gc, StoreError> {
        self.uploads().drop_idle();
        clean(&self.inner.dir.join("damaged"), DAMAGED_KEPT).map_err(|e| self.io(e, "remove damaged content"))?;
        let _guard = self.inner.links.write().unwrap_or_else(|e| e.into_inner());
        let mut done = Gc::default();
        let mut held = BTreeSet::new();
        for name in self.list(&self.inner.dir.join("repos"))? {
            let Ok(repo) = name.replace('+', "/").parse::<Repo>() else { continue };
            self.collect_repo(&repo, keep, grace, &mut held, &mut done)?;
        }
        let mut kept = BTreeSet::new();
        for digest in keep {
            self.mark_content(digest, MAX_DEPTH, &mut kept)?;
        }
        held.append(&mut kept);
        let blobs = self.inner.dir.join("blobs");
        for part in self.list(&blobs)? {
            for hex in self.list(&blobs.join(&part))? {
                let path = blobs.join(&part).join(&hex);
                if !held.contains(&hex) && is_older(&path, grace) {
                    let len = fs::metadata(&path).map(|m| m.len()).unwrap_or(0);
                    fs::remove_file(&path).map_err(|e| self.io(e, "remove a blob"))?;
                    done.blobs_removed += 1;
                    done.bytes_freed += len;
                }
            }
        }
        Ok(done)
    }

    fn collect_repo(&self, repo: &Repo, keep: &[Digest], grace: Duration, held: &mut BTreeSet<String>, done: &mut Gc) -> Result<(), StoreError> {
        let dir = self.repo(repo);
        let mut marked = BTreeSet::new();
        let manifests = self.list(&dir.join("manifests"))?;
        for tag in self.tags(repo)? {
            if let Some(digest) = self.resolve_tag(repo, &tag)? {
                self.mark(repo, &digest, MAX_DEPTH, &mut marked)?;
            }
        }
        for hex in &manifests {
            let Some(digest) = Digest::from_hex(hex) else { continue };
            if keep.contains(&digest) || !is_older(&dir.join("manifests").join(hex), grace) {
                self.mark(repo, &digest, MAX_DEPTH, &mut marked)?;
            }
        }
        for hex in manifests.iter().filter(|hex| !marked.contains(*hex)) {
            fs::remove_file(dir.join("manifests").join(hex)).map_err(|e| self.io(e, "remove a manifest"))?;
            done.manifests_removed += 1;
        }
        for subject in self.list(&dir.join("referrers"))? {
            let referrers = dir.join("referrers").join(&subject);
            for hex in self.list(&referrers)?.iter().filter(|hex| !marked.contains(*hex)) {
                fs::remove_file(referrers.join(hex)).map_err(|e| self.io(e, "remove a referrer"))?;
            }
        }
        for hex in self.list(&dir.join("blobs"))? {
            let link = dir.join("blobs").join(&hex);
            if marked.contains(&hex) || !is_older(&link, grace) {
                held.insert(hex);
            } else {
                fs::remove_file(&link).map_err(|e| self.io(e, "remove a link"))?;
            }
        }
        held.extend(marked);
        Ok(())
    }

    /// Marks a manifest and what it refers to, whatever repository has it.
    fn mark_content(&self, digest: &Digest, depth: usize, marked: &mut BTreeSet<String>) -> Result<(), StoreError> {
        if depth == 0 || !marked.insert(digest.hex().to_owned()) {
            return Ok(());
        }
        let Some(manifest) = self.readable(digest)? else { return Ok(()) };
        marked.extend(manifest.blobs().map(|blob| blob.digest.hex().to_owned()));
        manifest.manifests.iter().try_for_each(|child| self.mark_content(&child.digest, depth - 1, marked))
    }

    /// A manifest that cannot be read holds nothing it could name; a disk that fails must stop us.
    fn readable(&self, digest: &Digest) -> Result<Option<Manifest>, StoreError> {
        match self.parsed(digest) {
            Ok(manifest) => Ok(Some(manifest)),
            Err(StoreError::NotFound(_) | StoreError::Damaged(_) | StoreError::Invalid(_)) => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Marks a manifest, what it refers to, and what refers to it.
    fn mark(&self, repo: &Repo, digest: &Digest, depth: usize, marked: &mut BTreeSet<String>) -> Result<(), StoreError> {
        if depth == 0 || !marked.insert(digest.hex().to_owned()) {
            return Ok(());
        }
        let Some(manifest) = self.readable(digest)? else { return Ok(()) };
        marked.extend(manifest.blobs().map(|blob| blob.digest.hex().to_owned()));
        for child in &manifest.manifests {
            self.mark(repo, &child.digest, depth - 1, marked)?;
        }
        let referrers = list(&self.repo(repo).join("referrers").join(digest.hex()));
        for hex in referrers.map_err(|e| self.io(e, "list referrers"))? {
            if let Some(referrer) = Digest::from_hex(&hex) {
                self.mark(repo, &referrer, depth - 1, marked)?;
            }
        }
        Ok(())
    }
}

/// What cannot be dated is young.
fn is_older(path: &Path, grace: Duration) -> bool {
    let modified = fs::metadata(path).and_then(|metadata| metadata.modified());
    modified.is_ok_and(|at| SystemTime::now().duration_since(at).is_ok_and(|age| age >= grace))
}
