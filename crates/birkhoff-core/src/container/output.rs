//! A file that appears under its name complete or not at all.

use std::fs::{self, File, Permissions};
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
        let path = match fs::metadata(path) {
            Ok(found) if found.is_dir() => {
                return Err(error(path, io::ErrorKind::IsADirectory.into()));
            }
            Ok(_) if !overwrite => return Err(error(path, io::ErrorKind::AlreadyExists.into())),
            Ok(found) if !found.is_file() => {
                let reason = io::Error::other("this is not a regular file; choose another output");
                return Err(error(path, reason));
            }
            // A link keeps pointing to what is overwritten.
            Ok(_) => fs::canonicalize(path).map_err(|source| error(path, source))?,
            Err(_) => path.to_owned(),
        };
        let folder = folder(&path);
        let mut builder = tempfile::Builder::new();
        builder.prefix(".birkhoff-").suffix(".tmp");
        #[cfg(unix)]
        builder.permissions(<Permissions as std::os::unix::fs::PermissionsExt>::from_mode(0o666));
        let file = builder.tempfile_in(folder).map_err(|source| error(folder, system(source)))?;
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
        let error = |source| Error::Io { path: path.clone(), source: system(source) };
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

/// The system's own error, where `tempfile` has wrapped it with the temporary name.
fn system(error: io::Error) -> io::Error {
    let inner = error.get_ref().and_then(|wrapper| wrapper.source());
    match inner.and_then(|inner| inner.downcast_ref::<io::Error>()?.raw_os_error()) {
        Some(code) => io::Error::from_raw_os_error(code),
        None => error,
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
