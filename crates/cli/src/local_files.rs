//! Files of the app's directory that go into machines as they are.

use crate::CliError;
use dunlin_model::MachineFile;
use dunlin_model::config::AppConfig;
use dunlin_model::files::MAX_INLINE_BYTES;
use std::fs::File;
use std::io::Read;
use std::path::Path;

/// Puts the content of every `local_path` in its place: the server sees no file of this computer.
pub fn read_in(mut config: AppConfig, dir: &Path) -> Result<AppConfig, CliError> {
    for entry in &mut config.files {
        if let Some(local) = entry.local_path.take() {
            entry.raw_value = Some(encoded(&dir.join(&local))?);
        }
    }
    Ok(config)
}

fn encoded(path: &Path) -> Result<String, CliError> {
    let most = MAX_INLINE_BYTES / 4 * 3;
    let mut content = Vec::new();
    File::open(path)
        .and_then(|file| file.take(most as u64 + 1).read_to_end(&mut content))
        .map_err(|e| CliError::usage(format!("[[files]]: {} cannot be read: {e}", path.display())))?;
    if content.len() > most {
        return Err(CliError::usage(format!("[[files]]: {} has more than {most} bytes", path.display()))
            .hint("put large files into the image"));
    }
    Ok(MachineFile::encode(&content))
}

#[cfg(test)]
mod tests {
    use super::*;
    use dunlin_model::config::FileEntry;

    #[test]
    fn a_local_path_becomes_its_content() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("motd"), "hello").unwrap();
        std::fs::write(dir.path().join("large"), vec![0; MAX_INLINE_BYTES]).unwrap();
        let read = |path: &str| {
            let file = FileEntry { guest_path: "/motd".into(), local_path: Some(path.into()), ..FileEntry::default() };
            read_in(AppConfig { files: vec![file], ..AppConfig::default() }, dir.path())
        };
        let config = read("motd").unwrap();
        assert_eq!((config.files[0].raw_value.as_deref(), &config.files[0].local_path), (Some("aGVsbG8="), &None));
        assert!(read("large").is_err() && read("missing").is_err());
    }
}
