//! Control's own keys, each in its own 0600 file, made at the first start.

use dunlin_model::seal::OpeningKey;
use ed25519_dalek::SigningKey;
use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use zeroize::Zeroizing;

const KEY_BYTES: usize = 32;
const MASTER: &str = "master.key";

#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    #[error("the key file {} cannot be {verb}", .path.display())]
    Io {
        path: PathBuf,
        verb: &'static str,
        #[source]
        source: io::Error,
    },
    #[error(
        "the key file {} is missing, and secrets are sealed to it: restore it from a backup. If it is lost, the secrets \
         are: make a new one (`(umask 077; head -c 32 /dev/urandom > {})`) and set them again",
        .path.display(), .path.display()
    )]
    Lost { path: PathBuf },
    #[error("the key file {} holds {found} bytes, not {KEY_BYTES}: restore it from a backup", .path.display())]
    Damaged { path: PathBuf, found: usize },
    #[error("the key file {} may be read by others (mode {mode:o}): `chmod 600` it, and rotate the key if they did", .path.display())]
    TooOpen { path: PathBuf, mode: u32 },
}

/// The master key seals secrets at rest; the token key signs capabilities.
pub(crate) struct Keys {
    pub master: OpeningKey,
    pub tokens: SigningKey,
}

impl Keys {
    /// Refuses a directory from which the master key has gone: with a new one in its place nothing that is sealed would
    /// ever open again, and nobody would know why.
    pub fn refuse_lost(control_dir: &Path) -> Result<(), KeyError> {
        let path = control_dir.join(MASTER);
        if path.exists() { Ok(()) } else { Err(KeyError::Lost { path }) }
    }

    pub fn load_or_create(control_dir: &Path) -> Result<Self, KeyError> {
        private_dir(control_dir)?;
        let master = load_or_create(&control_dir.join(MASTER))?;
        let tokens = load_or_create(&control_dir.join("token.key"))?;
        Ok(Self { master: OpeningKey::from_bytes(*master), tokens: SigningKey::from_bytes(&tokens) })
    }
}

/// Makes a directory that only root may enter.
pub(crate) fn private_dir(path: &Path) -> Result<(), KeyError> {
    let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(path);
    made.map_err(|source| KeyError::Io { path: path.to_owned(), verb: "placed", source })
}

/// Of one key in its own 0600 file.
pub(crate) fn load_or_create(path: &Path) -> Result<Zeroizing<[u8; KEY_BYTES]>, KeyError> {
    let io = |verb| move |source| KeyError::Io { path: path.to_owned(), verb, source };
    match fs::read(path) {
        Ok(bytes) => {
            let bytes = Zeroizing::new(bytes);
            let mode = fs::metadata(path).map_err(io("read"))?.permissions().mode() & 0o777;
            if mode & 0o077 != 0 {
                return Err(KeyError::TooOpen { path: path.to_owned(), mode });
            }
            let found = bytes.len();
            let key = <[u8; KEY_BYTES]>::try_from(&bytes[..]);
            key.map(Zeroizing::new).map_err(|_| KeyError::Damaged { path: path.to_owned(), found })
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let key = Zeroizing::new(random::<KEY_BYTES>());
            write_private(path, &*key)?;
            Ok(key)
        }
        Err(source) => Err(io("read")(source)),
    }
}

/// Writes a 0600 file whole or not at all, durably.
pub(crate) fn write_private(path: &Path, bytes: &[u8]) -> Result<(), KeyError> {
    let io = |source| KeyError::Io { path: path.to_owned(), verb: "written", source };
    let partial = path.with_extension("partial");
    let mut file =
        OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&partial).map_err(io)?;
    file.write_all(bytes).and_then(|()| file.sync_all()).map_err(io)?;
    fs::rename(&partial, path).map_err(io)?;
    if let Some(dir) = path.parent() {
        fs::File::open(dir).and_then(|dir| dir.sync_all()).map_err(io)?;
    }
    Ok(())
}

/// Fresh random bytes from the kernel.
pub(crate) fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    // The kernel's generator fails only where the syscall is missing; going on without it would be worse.
    getrandom::fill(&mut bytes).expect("the kernel gives random bytes");
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_made_once_and_only_root_reads_them() {
        let dir = tempfile::tempdir().unwrap();
        let control = dir.path().join("control");
        let first = Keys::load_or_create(&control).unwrap();
        let again = Keys::load_or_create(&control).unwrap();
        assert_eq!(*first.master.to_bytes(), *again.master.to_bytes());
        let path = control.join("master.key");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        assert!(matches!(Keys::load_or_create(&control), Err(KeyError::TooOpen { .. })));
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        fs::write(&path, b"short").unwrap();
        assert!(matches!(Keys::load_or_create(&control), Err(KeyError::Damaged { found: 5, .. })));
    }
}
