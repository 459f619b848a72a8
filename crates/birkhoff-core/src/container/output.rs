//! A file that appears under its name complete or not at all.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;

use crate::error::{Error, Result};

/// A temporary file in the folder of the output; dropping it removes it.
#[derive(Debug)]
pub(super) struct OutputFile {
    file: NamedTempFile,
    path: PathBuf,
    overwrite: bool,
}

impl OutputFile {
    /// Starts a file that will be `path`.
    ///
    /// # Errors
    /// [`Error::Io`] if there is something at `path` already that is not to be overwritten, or no
    /// file can be made in its folder.
    pub(super) fn create(path: &Path, overwrite: bool) -> Result<OutputFile> {
        let error = |path: &Path, source| Error::Io { path: path.to_owned(), source };
        let refused = |kind, reason: &str| Err(error(path, io::Error::new(kind, reason)));
        let path = match fs::metadata(path) {
            Ok(found) if found.is_dir() => {
                return refused(io::ErrorKind::IsADirectory, "this is a folder, not a file");
            }
            Ok(found) if !found.is_file() => {
                return refused(io::ErrorKind::Other, "this is not a regular file");
            }
            Ok(_) if !overwrite => {
                return refused(
                    io::ErrorKind::AlreadyExists,
                    "the file exists already; choose another output or have it overwritten",
                );
            }
            // A link keeps pointing to what is overwritten.
            Ok(_) => fs::canonicalize(path).map_err(|source| error(path, source))?,
            Err(_) => path.to_owned(),
        };
        let folder = folder(&path);
        // Opened here and not by `tempfile`, which would keep the file from all other users.
        let file = tempfile::Builder::new()
            .prefix(".birkhoff-")
            .suffix(".tmp")
            .make_in(folder, |path| File::create_new(path))
            .map_err(|source| error(folder, source))?;
        Ok(OutputFile { file, path, overwrite })
    }

    /// Its path when it is complete.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Writes `bytes` at `offset`; several threads may do so at once.
    ///
    /// # Errors
    /// [`Error::Io`], also if the disk is full.
    pub(super) fn write_at(&self, bytes: &[u8], offset: u64) -> Result<()> {
        write_all_at(self.file.as_file(), bytes, offset).map_err(|source| self.error(source))
    }

    /// Makes the file durable and gives it its name.
    ///
    /// # Errors
    /// [`Error::Io`]; nothing is left behind then.
    pub(super) fn commit(self) -> Result<()> {
        let OutputFile { file, path, overwrite } = self;
        let error = |source| Error::Io { path: path.clone(), source };
        file.as_file().sync_all().map_err(error)?;
        let renamed = if overwrite { file.persist(&path) } else { file.persist_noclobber(&path) };
        renamed.map_err(|failed| error(failed.error))?;
        // The file is complete under its name; not every system can sync a folder.
        #[cfg(unix)]
        let _ = File::open(folder(&path)).and_then(|folder| folder.sync_all());
        Ok(())
    }

    fn error(&self, source: io::Error) -> Error {
        Error::Io { path: self.path.clone(), source }
    }
}

/// The folder that `path` lies in.
fn folder(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if folder != Path::new("") => folder,
        _ => Path::new("."),
    }
}

#[cfg(unix)]
fn write_all_at(file: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::write_all_at(file, bytes, offset)
}

#[cfg(windows)]
fn write_all_at(file: &File, mut bytes: &[u8], mut offset: u64) -> io::Result<()> {
    while !bytes.is_empty() {
        match std::os::windows::fs::FileExt::seek_write(file, bytes, offset)? {
            0 => return Err(io::ErrorKind::WriteZero.into()),
            written => {
                bytes = &bytes[written..];
                offset += written as u64;
            }
        }
    }
    Ok(())
}
