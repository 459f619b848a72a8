//! Compressing a checkpoint, tensor by tensor.

use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::header::Placement;
use super::manifest::{
    self, Checksum, Coding, METADATA_KEY, Manifest, PartChecksums, Settings, Tensor, VERSION,
    float_dtype,
};
use super::output::OutputFile;
use crate::codec::encode::{Distortion, EncodeOptions, encode_into};
use crate::codec::{Feedback, ScaleRefit};
use crate::dtype::FloatSlice;
use crate::error::{Error, Result};
use crate::isa::Isa;
use crate::layout;

/// How a file is written.
#[derive(Clone, Debug)]
pub struct WriterOptions {
    /// Stored in the file for its readers.
    pub settings: Settings,
    /// Whether a file of the same name is replaced.
    pub overwrite: bool,
    /// How row scales are corrected after the search.
    pub refit: ScaleRefit,
    /// The instruction set of the encoder.
    pub isa: Isa,
}

/// A compressed file in the making.
///
/// All sizes follow from the plan, so tensors may come in any order, also from several threads; no
/// more than those being written are held in memory. The file appears under its name with
/// [`Writer::finish`]; until then, and if the writer is dropped, there is only a temporary file.
#[derive(Debug)]
pub struct Writer {
    output: OutputFile,
    options: WriterOptions,
    plan: Vec<Tensor>,
    by_name: HashMap<String, usize>,
    placement: Placement,
    /// Where the data section starts.
    data_start: u64,
    progress: Mutex<Progress>,
}

/// Which tensors have been written.
#[derive(Debug, Default)]
struct Progress {
    /// Indices of tensors that are written or being written.
    begun: HashSet<usize>,
    /// The coding of each finished tensor, with its checksums.
    written: HashMap<usize, Coding>,
}

impl Writer {
    /// Starts a file at `path` that holds the tensors of `plan`, whose checksums are ignored.
    ///
    /// # Errors
    /// [`Error::Tensor`] if the plan is impossible, [`Error::Io`] if the file cannot be made.
    pub fn create(path: &Path, plan: Vec<Tensor>, options: WriterOptions) -> Result<Writer> {
        let settings = options.settings.clone();
        let manifest = Manifest { version: VERSION, settings, tensors: plan };
        let placement = Placement::new(manifest.stored_tensors()?)?;
        let header = header(path, &placement, &manifest)?;
        let plan = manifest.tensors;
        let by_name = plan.iter().enumerate().map(|(i, tensor)| (tensor.name.clone(), i)).collect();
        Ok(Writer {
            output: OutputFile::create(path, options.overwrite)?,
            options,
            plan,
            by_name,
            placement,
            data_start: header.len() as u64,
            progress: Mutex::default(),
        })
    }

    /// Writes a tensor, given its elements in their original dtype (little-endian, row-major), on
    /// the current rayon pool, and says what its coding cost.
    ///
    /// # Errors
    /// [`Error::Tensor`] if it is not in the plan, already written, tied, of another size or not
    /// finite; [`Error::Io`]. After an error the tensor may be written again.
    pub fn write(&self, name: &str, data: &[u8]) -> Result<Distortion> {
        self.write_with(name, data, None)
    }

    /// As [`Writer::write`], with error feedback if there is any and the tensor is coded.
    ///
    /// # Errors
    /// As [`Writer::write`]; [`Error::Tensor`] also if the feedback is for another number of columns.
    pub fn write_with(
        &self,
        name: &str,
        data: &[u8],
        feedback: Option<&Feedback>,
    ) -> Result<Distortion> {
        self.write_once(name, |tensor| {
            let expected = tensor.original_len()?;
            if data.len() != expected {
                return Err(tensor.error(format!(
                    "{} of shape {:?} takes {expected} bytes, not {}",
                    tensor.dtype,
                    tensor.shape,
                    data.len()
                )));
            }
            self.write_data(tensor, data, feedback)
        })
    }

    /// Writes a tensor that is coded already, given its codes, row scales and group exponents.
    ///
    /// # Errors
    /// [`Error::Tensor`] if it is not to be coded by the plan, already written, or a part is of
    /// another length; [`Error::Io`]. After an error the tensor may be written again.
    pub fn write_coded(&self, name: &str, parts: [&[u8]; 3]) -> Result<()> {
        self.write_once(name, |tensor| {
            let Coding::Coded { codec, bits, rows, cols, .. } = tensor.coding.clone() else {
                return Err(tensor.error("the plan does not say that it is coded".into()));
            };
            let layout = tensor.layout()?.expect("it is coded");
            let expected =
                [layout.codes_len(), layout.row_scales_len(), layout.group_exponents_len()];
            if parts.map(<[u8]>::len) != expected {
                return Err(tensor.error(format!(
                    "its parts take {expected:?} bytes, not {:?}",
                    parts.map(<[u8]>::len)
                )));
            }
            let checksums = self.write_parts(&tensor.name, parts)?;
            Ok((Coding::Coded { codec, bits, rows, cols, checksums }, ()))
        })
    }

    /// Runs `write` on a tensor of the plan that has not been written, and notes its coding.
    fn write_once<T>(
        &self,
        name: &str,
        write: impl FnOnce(&Tensor) -> Result<(Coding, T)>,
    ) -> Result<T> {
        let error =
            |reason: &str| Error::Tensor { name: name.to_owned(), reason: reason.to_owned() };
        let &index = self.by_name.get(name).ok_or_else(|| error("it is not in the plan"))?;
        let tensor = &self.plan[index];
        if matches!(tensor.coding, Coding::Tied { .. }) {
            return Err(error("it is tied to another tensor and has no data of its own"));
        }
        if !self.progress().begun.insert(index) {
            return Err(error("it was written before"));
        }
        let result = write(tensor);
        let mut progress = self.progress();
        match result {
            Ok((coding, result)) => {
                progress.written.insert(index, coding);
                Ok(result)
            }
            Err(error) => {
                progress.begun.remove(&index);
                Err(error)
            }
        }
    }

    /// Writes the data of a tensor; returns its coding with the checksums.
    fn write_data(
        &self,
        tensor: &Tensor,
        data: &[u8],
        feedback: Option<&Feedback>,
    ) -> Result<(Coding, Distortion)> {
        match tensor.coding.clone() {
            Coding::Coded { codec, bits, rows, cols, .. } => {
                let layout = tensor.layout()?.expect("it is coded");
                let [mut codes, mut row_scales, mut group_exponents] =
                    [layout.codes_len(), layout.row_scales_len(), layout.group_exponents_len()]
                        .map(layout::zeroed);
                let options =
                    EncodeOptions { codec, bits, refit: self.options.refit, isa: self.options.isa };
                let dtype = float_dtype(tensor.dtype).expect("the plan was checked");
                let distortion = FloatSlice::new(data, dtype)
                    .and_then(|data| {
                        let parts = (&mut codes, &mut row_scales, &mut group_exponents);
                        encode_into(data, layout, &options, feedback, parts.0, parts.1, parts.2)
                    })
                    .map_err(|error| tensor.error(error.to_string()))?;
                let checksums =
                    self.write_parts(&tensor.name, [&codes, &row_scales, &group_exponents])?;
                Ok((Coding::Coded { codec, bits, rows, cols, checksums }, distortion))
            }
            Coding::Stored { dtype, .. } => {
                let coding = |bytes| Coding::Stored { dtype, checksum: Checksum::of(bytes) };
                if dtype == tensor.dtype {
                    self.write_stored(&tensor.name, data)?;
                    return Ok((coding(data), Distortion::default()));
                }
                let [from, to] = [tensor.dtype, dtype]
                    .map(|dtype| float_dtype(dtype).expect("the plan was checked"));
                let original = FloatSlice::new(data, from)?;
                let bytes = original.to_dtype(to);
                let converted = FloatSlice::new(&bytes, to)?;
                let overflows = (original.values().zip(converted.values()))
                    .filter(|(original, converted)| original.is_finite() && !converted.is_finite())
                    .count();
                if overflows > 0 {
                    return Err(tensor.error(format!(
                        "{overflows} of {} values are too large for {dtype}; store it as {}",
                        original.len(),
                        tensor.dtype
                    )));
                }
                self.write_stored(&tensor.name, &bytes)?;
                Ok((coding(&bytes), original.distortion(converted)))
            }
            Coding::Tied { .. } => unreachable!("tied tensors were refused"),
        }
    }

    /// Writes the codes, row scales and group exponents of the tensor `name`.
    fn write_parts(&self, name: &str, parts: [&[u8]; 3]) -> Result<PartChecksums> {
        for (name, part) in manifest::part_names(name).iter().zip(parts) {
            self.write_stored(name, part)?;
        }
        let [codes, row_scales, group_exponents] = parts;
        Ok(PartChecksums::of(codes, row_scales, group_exponents))
    }

    fn write_stored(&self, name: &str, bytes: &[u8]) -> Result<()> {
        self.output.write_at(bytes, self.data_start + self.placement.offset(name))
    }

    /// Completes the file and returns its size in bytes.
    ///
    /// # Errors
    /// [`Error::Format`] if tensors are missing, [`Error::Io`]; nothing is left behind then.
    pub fn finish(self) -> Result<u64> {
        let mut written = std::mem::take(&mut *self.progress()).written;
        let Writer { output, options, mut plan, placement, data_start, .. } = self;
        let mut missing = Vec::new();
        for (index, tensor) in plan.iter_mut().enumerate() {
            match written.remove(&index) {
                Some(coding) => tensor.coding = coding,
                None if matches!(tensor.coding, Coding::Tied { .. }) => {}
                None => missing.push(tensor.name.as_str()),
            }
        }
        if let Some(first) = missing.first() {
            let reason = format!("{} tensors were not written, first {first:?}", missing.len());
            return Err(Error::Format { path: output.path().to_owned(), reason });
        }
        let manifest = Manifest { version: VERSION, settings: options.settings, tensors: plan };
        let header = header(output.path(), &placement, &manifest)?;
        // Checksums have a fixed width.
        assert_eq!(header.len() as u64, data_start);
        output.write_at(&header, 0)?;
        output.commit()?;
        Ok(data_start + placement.data_len())
    }

    fn progress(&self) -> MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Bytes of the file that a [`Writer`] makes of a plan, whose checksums are ignored.
///
/// # Errors
/// As of [`Writer::create`].
pub fn planned_len(plan: Vec<Tensor>, settings: Settings) -> Result<u64> {
    let manifest = Manifest { version: VERSION, settings, tensors: plan };
    let placement = Placement::new(manifest.stored_tensors()?)?;
    let header = header(Path::new("the file"), &placement, &manifest)?;
    Ok(header.len() as u64 + placement.data_len())
}

/// The header of a compressed file; transformers wants `format` to say that it is PyTorch's.
fn header(path: &Path, placement: &Placement, manifest: &Manifest) -> Result<Vec<u8>> {
    serde_json::to_string(manifest)
        .map_err(|error| error.to_string())
        .and_then(|json| placement.header(&[("format", "pt"), (METADATA_KEY, &json)]))
        .map_err(|reason| Error::Format { path: path.to_owned(), reason })
}
