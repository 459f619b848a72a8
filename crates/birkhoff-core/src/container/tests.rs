//! Round trips, and files that must be refused.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use proptest::prelude::*;
use safetensors::SafeTensors;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::manifest::{Checksum, Manifest, PartChecksums, Settings, VERSION, part_names};
use super::{Coding, ElementType, File, Tensor, Writer, WriterOptions, decompress};
use crate::codec::{Codec, ScaleRefit};
use crate::error::Error;
use crate::isa::Isa;

fn tensor(name: &str, dtype: ElementType, shape: &[usize], coding: Coding) -> Tensor {
    Tensor { name: name.to_owned(), dtype, shape: shape.to_vec(), coding }
}

fn coded(bits: u32, rows: usize, cols: usize) -> Coding {
    Coding::Coded { codec: Codec::Shift, bits, rows, cols, checksums: PartChecksums::default() }
}

fn stored(dtype: ElementType) -> Coding {
    Coding::Stored { dtype, checksum: Checksum::default() }
}

fn tied(to: &str) -> Coding {
    Coding::Tied { to: to.to_owned() }
}

fn options() -> WriterOptions {
    let settings = json!({"bits": 4, "note": "é\"\\"}).as_object().unwrap().clone();
    WriterOptions { settings, overwrite: false, refit: ScaleRefit::default(), isa: Isa::best() }
}

/// Weights that look random, the same every time.
fn weights(count: usize) -> Vec<f32> {
    let mut state = 1u32;
    let mut uniform = || {
        state = state.wrapping_mul(1664525).wrapping_add(1013904223);
        f32::from((state >> 16) as u16) / 65536.0 - 0.5
    };
    (0..count).map(|_| uniform() + uniform() + uniform()).collect()
}

fn bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

fn plan() -> Vec<Tensor> {
    use ElementType::{BF16, BOOL, F16, F32, F64, I64};
    vec![
        tensor("norm.bias", F32, &[37], stored(F16)),
        tensor("linear.weight", F32, &[40, 70], coded(4, 40, 70)),
        tensor("conv.weight", F32, &[20, 3, 5, 5], coded(3, 20, 75)),
        tensor("flags", BOOL, &[5], stored(BOOL)),
        tensor("tied.weight", F32, &[40, 70], tied("linear.weight")),
        tensor("step", I64, &[], stored(I64)),
        tensor("empty", F32, &[0, 3], coded(8, 0, 3)),
        tensor("double", F64, &[3], stored(F64)),
        tensor("half.weight", BF16, &[4, 8], coded(8, 4, 8)),
    ]
}

fn data(tensor: &Tensor) -> Vec<u8> {
    let count = tensor.elements().unwrap();
    match tensor.dtype {
        ElementType::F32 => bytes(&weights(count)),
        ElementType::BF16 => {
            weights(count).iter().flat_map(|&v| half::bf16::from_f32(v).to_le_bytes()).collect()
        }
        ElementType::F64 => (0..count).flat_map(|i| (i as f64 / 3.0).to_le_bytes()).collect(),
        _ => vec![1; tensor.original_len().unwrap()],
    }
}

fn write(path: &Path) -> u64 {
    let writer = Writer::create(path, plan(), options()).unwrap();
    // Any order will do.
    for tensor in plan().iter().rev().filter(|tensor| !matches!(tensor.coding, Coding::Tied { .. }))
    {
        writer.write(&tensor.name, &data(tensor)).unwrap();
    }
    writer.finish().unwrap()
}

fn folder() -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    (folder, path)
}

/// Names of the files in a folder.
fn listing(folder: &TempDir) -> Vec<String> {
    let entries = fs::read_dir(folder.path()).unwrap();
    let mut names: Vec<_> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn tensors_survive_a_round_trip() {
    let (_folder, path) = folder();
    let len = write(&path);
    let file = File::open(&path).unwrap();
    assert_eq!(len, fs::metadata(&path).unwrap().len());
    assert_eq!(len, file.len() as u64);
    assert!(file.is_compressed());
    assert_eq!(file.settings(), &options().settings);
    assert!(file.metadata().any(|pair| pair == ("format", "pt")));
    assert_eq!(
        file.tensors().iter().map(|tensor| &tensor.name).collect::<Vec<_>>(),
        plan().iter().map(|tensor| &tensor.name).collect::<Vec<_>>()
    );
    for tensor in file.tensors() {
        file.check(&tensor.name).unwrap();
        let distortion =
            file.compare(Isa::best(), &tensor.name, &data(tensor), tensor.dtype).unwrap();
        assert!(distortion.sqnr_db() > 15.0, "{}: {distortion:?}", tensor.name);
    }
    let tied = file.float32(Isa::best(), "tied.weight").unwrap();
    assert_eq!(tied, file.matrix("linear.weight").unwrap().view().decode(Isa::Portable));
    assert_eq!(file.bytes("flags").unwrap(), [1; 5]);
    assert!(file.bytes("linear.weight").is_err() && file.matrix("flags").is_err());
}

#[test]
fn every_tensor_is_aligned_and_codes_start_on_cache_lines() {
    let (_folder, path) = folder();
    write(&path);
    let contents = fs::read(&path).unwrap();
    let start = contents.as_ptr() as usize;
    let tensors = SafeTensors::deserialize(&contents).unwrap();
    for (name, view) in tensors.iter() {
        let offset = view.data().as_ptr() as usize - start;
        let alignment = if name.ends_with(".codes") { 64 } else { view.dtype().bitsize() / 8 };
        assert_eq!(offset % alignment, 0, "{name}");
    }
}

#[test]
fn the_same_tensors_make_the_same_file() {
    let (_folder, path) = folder();
    let again = path.with_file_name("again");
    write(&path);
    write(&again);
    assert!(fs::read(path).unwrap() == fs::read(again).unwrap());
}

#[test]
fn coded_tensors_are_written_as_they_are() {
    let (folder, path) = folder();
    write(&path);
    let file = File::open(&path).unwrap();
    let copy = folder.path().join("copy.safetensors");
    let writer = Writer::create(&copy, plan(), options()).unwrap();
    for tensor in plan() {
        match tensor.coding {
            Coding::Coded { .. } => {
                let matrix = file.matrix(&tensor.name).unwrap();
                let view = matrix.view();
                let parts = [view.codes(), view.row_scales(), view.group_exponents()];
                if !view.codes().is_empty() {
                    let short = [&parts[0][1..], parts[1], parts[2]];
                    let message = writer.write_coded(&tensor.name, short).unwrap_err().to_string();
                    assert!(message.contains("bytes"), "{message}");
                }
                writer.write_coded(&tensor.name, parts).unwrap();
                assert!(writer.write_coded(&tensor.name, parts).is_err());
            }
            Coding::Stored { .. } => {
                assert!(writer.write_coded(&tensor.name, [&[]; 3]).is_err());
                writer.write(&tensor.name, &data(&tensor)).unwrap();
            }
            Coding::Tied { .. } => assert!(writer.write_coded(&tensor.name, [&[]; 3]).is_err()),
        }
    }
    writer.finish().unwrap();
    assert_eq!(fs::read(path).unwrap(), fs::read(copy).unwrap());
}

#[test]
fn manifests_of_files_that_other_programs_write() {
    let (_folder, path) = folder();
    write(&path);
    let contents = fs::read(&path).unwrap();
    let file = SafeTensors::deserialize(&contents).unwrap();
    let tensors = (plan().into_iter())
        .map(|tensor| {
            let names = match tensor.coding {
                Coding::Coded { .. } => part_names(&tensor.name).to_vec(),
                Coding::Stored { .. } => vec![tensor.name.clone()],
                Coding::Tied { .. } => vec![],
            };
            let data: Vec<_> = names.iter().map(|name| file.tensor(name).unwrap().data()).collect();
            let short: Vec<_> =
                data.iter().map(|bytes| bytes.get(1..).unwrap_or(b"more")).collect();
            if !data.is_empty() {
                assert!(tensor.clone().with_checksums(&short).is_err());
                assert!(tensor.clone().with_checksums(&data[1..]).is_err());
            }
            tensor.with_checksums(&data).unwrap()
        })
        .collect();
    let manifest = Manifest { version: VERSION, settings: options().settings, tensors };
    let (_, metadata) = SafeTensors::read_metadata(&contents).unwrap();
    assert_eq!(manifest.to_json().unwrap(), metadata.metadata().as_ref().unwrap()["birkhoff"]);
}

#[test]
fn decompression_gives_original_names_shapes_and_dtypes() {
    let (folder, path) = folder();
    write(&path);
    let out = folder.path().join("plain.safetensors");
    let file = File::open(&path).unwrap();
    let mut seen = Vec::new();
    let progress = |name: &str| -> Result<(), Error> {
        seen.push(name.to_owned());
        Ok(())
    };
    let len = decompress(&file, &out, false, Isa::best(), 2, progress).unwrap();
    assert_eq!(seen.len(), plan().len());
    let contents = fs::read(&out).unwrap();
    assert_eq!(len, contents.len() as u64);
    let plain = SafeTensors::deserialize(&contents).unwrap();
    assert_eq!(plain.len(), plan().len());
    for tensor in plan() {
        let view = plain.tensor(&tensor.name).unwrap();
        assert_eq!((view.dtype(), view.shape()), (tensor.dtype, &tensor.shape[..]));
    }
    assert_eq!(plain.tensor("double").unwrap().data(), data(&plan()[7]));
    let decoded = file.float32(Isa::best(), "tied.weight").unwrap();
    assert_eq!(plain.tensor("tied.weight").unwrap().data(), bytes(&decoded));
    let decoded = file.float32(Isa::best(), "half.weight").unwrap();
    let rounded: Vec<_> =
        decoded.iter().flat_map(|&value| half::bf16::from_f32(value).to_le_bytes()).collect();
    assert_eq!(plain.tensor("half.weight").unwrap().data(), rounded);

    // A plain file is read too, but not decompressed.
    let plain = File::open(&out).unwrap();
    assert!(!plain.is_compressed() && plain.settings().is_empty());
    assert_eq!(plain.float32(Isa::best(), "tied.weight").unwrap().len(), 40 * 70);
    let again = decompress(&plain, &path, true, Isa::best(), 1, |_| Ok::<_, Error>(()));
    assert!(again.unwrap_err().to_string().contains("not a compressed file"));
}

#[test]
fn large_matrices_are_decompressed_piece_by_piece() {
    // One strip is more than a piece: the last piece has a strip of one row.
    let (rows, cols) = (17, (1 << 18) + 1);
    let (folder, path) = folder();
    let plan = vec![tensor("w", ElementType::F32, &[rows, cols], coded(8, rows, cols))];
    let writer = Writer::create(&path, plan, options()).unwrap();
    writer.write("w", &bytes(&weights(rows * cols))).unwrap();
    writer.finish().unwrap();
    let file = File::open(&path).unwrap();
    let out = folder.path().join("out");
    decompress(&file, &out, false, Isa::best(), 2, |_| Ok::<_, Error>(())).unwrap();
    let out = File::open(&out).unwrap();
    assert!(out.bytes("w").unwrap() == bytes(&file.float32(Isa::best(), "w").unwrap()));
}

#[test]
fn nothing_is_left_of_an_unfinished_file() {
    let (folder, path) = folder();
    let writer = Writer::create(&path, plan(), options()).unwrap();
    assert_eq!(listing(&folder).len(), 1);
    drop(writer);
    assert!(listing(&folder).is_empty());

    let writer = Writer::create(&path, plan(), options()).unwrap();
    let message = writer.finish().unwrap_err().to_string();
    assert!(message.contains("norm.bias") && message.contains("8 tensors"), "{message}");
    assert!(listing(&folder).is_empty());

    write(&path);
    let file = File::open(&path).unwrap();
    let out = folder.path().join("out");
    let stop = |name: &str| match name {
        "flags" => Err(Error::Shape("stop".to_owned())),
        _ => Ok(()),
    };
    assert!(decompress(&file, &out, false, Isa::best(), 1, stop).is_err());
    assert_eq!(listing(&folder), ["model.safetensors"]);
}

#[test]
fn existing_files_are_kept_unless_told_otherwise() {
    let (folder, path) = folder();
    fs::write(&path, "precious").unwrap();
    let kind = |result: Result<Writer, Error>| match result.unwrap_err() {
        Error::Io { source, .. } => source.kind(),
        other => panic!("{other}"),
    };
    let exists = std::io::ErrorKind::AlreadyExists;
    assert_eq!(kind(Writer::create(&path, vec![], options())), exists);
    assert_eq!(fs::read(&path).unwrap(), b"precious");
    assert_eq!(
        kind(Writer::create(folder.path(), vec![], options())),
        std::io::ErrorKind::IsADirectory
    );
    let missing = folder.path().join("missing").join("out");
    assert_eq!(kind(Writer::create(&missing, vec![], options())), std::io::ErrorKind::NotFound);

    let overwrite = WriterOptions { overwrite: true, ..options() };
    Writer::create(&path, vec![], overwrite).unwrap().finish().unwrap();
    assert!(File::open(&path).unwrap().tensors().is_empty());

    // A file that appears while another is written is not replaced either.
    let late = folder.path().join("late");
    let writer = Writer::create(&late, vec![], options()).unwrap();
    fs::write(&late, "precious").unwrap();
    assert!(writer.finish().is_err());
    assert_eq!(fs::read(&late).unwrap(), b"precious");
    assert_eq!(listing(&folder), ["late", "model.safetensors"]);
}

#[cfg(unix)]
#[test]
fn overwriting_through_a_link_keeps_the_link() {
    let (folder, path) = folder();
    fs::write(&path, "old").unwrap();
    let link = folder.path().join("link");
    std::os::unix::fs::symlink(&path, &link).unwrap();
    let overwrite = WriterOptions { overwrite: true, ..options() };
    Writer::create(&link, vec![], overwrite).unwrap().finish().unwrap();
    assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
    File::open(&path).unwrap();
}

#[test]
fn unusable_data_is_refused_by_name_and_may_be_written_again() {
    let (_folder, path) = folder();
    let writer = Writer::create(&path, plan(), options()).unwrap();
    let mut values = weights(40 * 70);
    values[5] = f32::NAN;
    values[6] = f32::INFINITY;
    let refused = |name, data: &[u8], parts: &[&str]| {
        let message = writer.write(name, data).unwrap_err().to_string();
        assert!(parts.iter().all(|part| message.contains(part)), "{message}");
    };
    refused("linear.weight", &bytes(&values), &["linear.weight", "2 of 2800", "--skip"]);
    refused("linear.weight", &[0; 3], &["linear.weight", "11200 bytes, not 3"]);
    refused("norm.bias", &bytes(&[1e6; 37]), &["norm.bias", "37 of 37", "too large for F16"]);
    refused("tied.weight", &[0; 11200], &["tied"]);
    refused("other", &[], &["other", "not in the plan"]);
    values[5..7].fill(0.0);
    writer.write("linear.weight", &bytes(&values)).unwrap();
    refused("linear.weight", &bytes(&values), &["written before"]);
}

#[test]
fn impossible_plans_are_refused() {
    use ElementType::{F32, I32};
    let (folder, path) = folder();
    let matrix = || tensor("a", F32, &[2, 3], coded(4, 2, 3));
    let plans: [(Vec<Tensor>, &str); 13] = [
        (vec![matrix(), matrix()], "twice"),
        (vec![tensor("a", F32, &[2, 3], coded(4, 3, 3))], "no matrix of 3 x 3"),
        (vec![tensor("a", F32, &[2, 3], coded(7, 2, 3))], "no 7-bit rate"),
        (vec![tensor("a", I32, &[2, 3], coded(4, 2, 3))], "I32 tensors cannot be coded"),
        (vec![tensor("a", F32, &[2], stored(I32))], "F32 cannot be stored as I32"),
        (vec![tensor("a", ElementType::F4, &[3], stored(ElementType::F4))], "no whole bytes"),
        (vec![tensor("a", F32, &[usize::MAX, 2], stored(F32))], "too large"),
        (vec![tensor("a", F32, &[0, usize::MAX], coded(4, 0, usize::MAX))], "fit in memory"),
        (vec![tensor("a", F32, &[2], tied("b"))], "does not exist"),
        (vec![matrix(), tensor("b", F32, &[3, 2], tied("a"))], "another shape"),
        (vec![tensor("b", F32, &[1], tied("b"))], "itself tied"),
        (vec![matrix(), tensor("a.codes", F32, &[1], stored(F32))], "name of a tensor"),
        (vec![tensor("__metadata__", F32, &[1], stored(F32))], "reserves"),
    ];
    for (plan, reason) in plans {
        let message = Writer::create(&path, plan, options()).unwrap_err().to_string();
        assert!(message.contains(reason), "{message}");
        assert!(listing(&folder).is_empty());
    }
}

/// A file with this JSON header and data.
fn file_with(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()
}

/// Why a file of these bytes is refused.
fn refusal(contents: &[u8]) -> String {
    let (_folder, path) = folder();
    fs::write(&path, contents).unwrap();
    match File::open(&path) {
        Err(error @ Error::Format { .. }) => error.to_string(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn damaged_headers_are_refused() {
    let good = r#"{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}"#;
    let (_folder, path) = folder();
    fs::write(&path, file_with(good, &[1, 2])).unwrap();
    assert_eq!(File::open(&path).unwrap().bytes("a").unwrap(), [1, 2]);

    let reads = |contents: &[u8], reason: &str| {
        let message = refusal(contents);
        assert!(message.contains(reason), "{message}");
    };
    reads(b"", "0 bytes");
    reads(b"1234567", "7 bytes");
    reads(&[0; 100], "not a safetensors file");
    reads(b"PK\x03\x04 this is a pickle in a zip archive", "not a safetensors file");
    reads(&[u64::MAX.to_le_bytes().as_slice(), b"{}"].concat(), "not a safetensors file");
    reads(&[99_999_999u64.to_le_bytes().as_slice(), b"{}"].concat(), "cut short");
    reads(&file_with(good, &[1]), "cut short");
    reads(&file_with(good, &[1, 2, 3]), "take 2 bytes, but it holds 3");
    reads(&file_with(&good[..20], &[]), "header is damaged");
    reads(&file_with(&"{\"a\":".repeat(100_000), &[]), "header is damaged");
    for header in [
        r#"{"a":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}}"#,
        r#"{"a":{"dtype":"U8","shape":[2],"data_offsets":[2,0]}}"#,
        r#"{"a":{"dtype":"U8","shape":[-2],"data_offsets":[0,2]}}"#,
        r#"{"a":{"dtype":"U7","shape":[2],"data_offsets":[0,2]}}"#,
        r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,2]}}"#,
        r#"{"a":{"dtype":"U8","shape":[4294967296,4294967296],"data_offsets":[0,2]}}"#,
        r#"{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},
            "b":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}"#,
        r#"{"__metadata__":{"birkhoff":7}}"#,
        r#"[]"#,
    ] {
        refusal(&file_with(header, &[1, 2]));
    }
}

#[test]
fn offsets_near_the_largest_number_are_refused() {
    // With the bytes of the header, the end of the last tensor overflows.
    let size = u64::MAX / 8;
    let tensors: Vec<_> = (0..8)
        .map(|i| {
            let (start, end) = (i * size, (i + 1) * size);
            format!(r#""{i}":{{"dtype":"U8","shape":[{size}],"data_offsets":[{start},{end}]}}"#)
        })
        .collect();
    let message = refusal(&file_with(&format!("{{{}}}", tensors.join(",")), &[]));
    assert!(message.contains("cut short or damaged"), "{message}");
}

/// The parsed header, manifest and data of a valid file.
fn taken_apart() -> (Value, Value, Vec<u8>) {
    let (_folder, path) = folder();
    write(&path);
    let contents = fs::read(&path).unwrap();
    let len = u64::from_le_bytes(contents[..8].try_into().unwrap()) as usize;
    let header: Value = serde_json::from_slice(&contents[8..8 + len]).unwrap();
    let manifest = serde_json::from_str(header["__metadata__"]["birkhoff"].as_str().unwrap());
    (header, manifest.unwrap(), contents[8 + len..].to_vec())
}

fn put_together(mut header: Value, manifest: &Value, data: &[u8]) -> Vec<u8> {
    header["__metadata__"]["birkhoff"] = Value::String(manifest.to_string());
    file_with(&header.to_string(), data)
}

#[test]
fn wrong_manifests_are_refused() {
    let (header, manifest, data) = taken_apart();
    let (_folder, path) = folder();
    fs::write(&path, put_together(header.clone(), &manifest, &data)).unwrap();
    File::open(&path).unwrap();

    let cases: [(&str, Value, &str); 21] = [
        ("/version", json!(2), "install a newer birkhoff"),
        ("/version", json!(0), "version 0"),
        ("/version", json!("1"), "damaged"),
        ("/settings", json!([]), "damaged"),
        ("/tensors/0/name", json!("linear.weight"), "twice"),
        ("/tensors/0/name", json!("other"), "missing"),
        ("/tensors/0/dtype", json!("I8"), "cannot be stored"),
        ("/tensors/0/shape", json!([38]), "shape in the file"),
        ("/tensors/0/coding/stored/dtype", json!("BF16"), "dtype in the file"),
        ("/tensors/0/coding/stored/checksum", json!("12"), "checksum"),
        ("/tensors/0/coding", json!({}), "damaged"),
        ("/tensors/0/coding", json!({"tied": {"to": "tied.weight"}}), "itself tied"),
        ("/tensors/0/coding", json!({"zipped": {}}), "zipped"),
        ("/tensors/1/shape", json!([40, 71]), "no matrix"),
        ("/tensors/1/shape", json!([u64::MAX, u64::MAX]), "too large"),
        ("/tensors/1/coding/coded/codec", json!("zip"), "no codec"),
        ("/tensors/1/coding/coded/bits", json!(5), "shape in the file"),
        ("/tensors/1/coding/coded/bits", json!(1u64 << 40), "damaged"),
        ("/tensors/1/coding/coded/rows", json!(-1), "damaged"),
        ("/tensors/4/coding/tied/to", json!("tied.weight"), "itself tied"),
        ("/tensors/4/coding/tied/to", json!("nothing"), "does not exist"),
    ];
    for (pointer, value, reason) in cases {
        let mut manifest = manifest.clone();
        *manifest.pointer_mut(pointer).unwrap() = value;
        let message = refusal(&put_together(header.clone(), &manifest, &data));
        assert!(message.contains(reason), "{pointer}: {message}");
    }
    let mut fewer = manifest.clone();
    fewer["tensors"].as_array_mut().unwrap().remove(3);
    let message = refusal(&put_together(header.clone(), &fewer, &data));
    assert!(message.contains("\"flags\"") && message.contains("not in the manifest"), "{message}");
}

#[test]
fn a_missing_part_is_named() {
    let (mut header, manifest, data) = taken_apart();
    let part = header.as_object_mut().unwrap().remove("linear.weight.row_scales").unwrap();
    header["renamed"] = part;
    let message = refusal(&put_together(header, &manifest, &data));
    assert!(
        message.contains("linear.weight.row_scales") && message.contains("missing"),
        "{message}"
    );
}

#[test]
fn damaged_data_have_a_wrong_checksum() {
    let (_folder, path) = folder();
    write(&path);
    let contents = fs::read(&path).unwrap();
    let names = ["linear.weight.codes", "linear.weight.row_scales", "norm.bias"];
    for name in names {
        let tensors = SafeTensors::deserialize(&contents).unwrap();
        let data = tensors.tensor(name).unwrap().data();
        let at = data.as_ptr() as usize - contents.as_ptr() as usize + data.len() / 2;
        let mut damaged = contents.clone();
        damaged[at] ^= 4;
        fs::write(&path, damaged).unwrap();
        let file = File::open(&path).unwrap();
        let wrong = plan()
            .iter()
            .filter_map(|tensor| file.check(&tensor.name).err())
            .map(|error| error.to_string())
            .collect::<Vec<_>>();
        // A tied tensor is as damaged as the one that holds its data.
        assert_eq!(wrong.len(), if name.starts_with("linear") { 2 } else { 1 });
        assert!(wrong[0].contains(name), "{wrong:?}");
        let out = path.with_file_name("out");
        let result = decompress(&file, &out, false, Isa::best(), 1, |_| Ok::<_, Error>(()));
        assert!(matches!(result, Err(Error::Tensor { .. })) && !out.exists());
    }
}

#[test]
fn unaligned_codes_of_a_rewritten_file_are_read() {
    let (header, manifest, data) = taken_apart();
    let (_folder, path) = folder();
    let original = path.with_file_name("original");
    write(&original);
    let expected = File::open(&original).unwrap().float32(Isa::best(), "linear.weight").unwrap();
    let mut header_text = put_together(header.clone(), &manifest, &[]).split_off(8);
    for _ in 0..3 {
        // JSON may end in any number of spaces.
        header_text.push(b' ');
        let len = (header_text.len() as u64).to_le_bytes();
        fs::write(&path, [len.as_slice(), &header_text, &data].concat()).unwrap();
        let file = File::open(&path).unwrap();
        assert_eq!(file.float32(Isa::best(), "linear.weight").unwrap(), expected);
    }
}

/// Opens a file and reads everything from it; only a panic is a failure.
fn read_everything(path: &Path) {
    let Ok(file) = File::open(path) else { return };
    for tensor in file.tensors() {
        let _ = file.check(&tensor.name);
        let _ = file.bytes(&tensor.name);
        let _ = file.float32(Isa::best(), &tensor.name);
        let _ = file.compare(Isa::best(), &tensor.name, &[], tensor.dtype);
    }
    let out = path.with_file_name("out");
    let _ = decompress(&file, &out, true, Isa::best(), 1, |_| Ok::<_, Error>(()));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn damaged_files_never_panic(
        flips in prop::collection::vec((any::<prop::sample::Index>(), 0u8..8, any::<bool>()), 1..4),
        cut in prop::option::weighted(0.2, any::<prop::sample::Index>()),
    ) {
        static CONTENTS: LazyLock<Vec<u8>> = LazyLock::new(|| {
            let (_folder, path) = folder();
            write(&path);
            fs::read(path).unwrap()
        });
        let mut contents = CONTENTS.clone();
        let header = 8 + u64::from_le_bytes(contents[..8].try_into().unwrap()) as usize;
        for (at, bit, anywhere) in flips {
            let at = at.index(if anywhere { contents.len() } else { header });
            contents[at] ^= 1 << bit;
        }
        if let Some(cut) = cut {
            contents.truncate(cut.index(contents.len()));
        }
        let (_folder, path) = folder();
        fs::write(&path, contents).unwrap();
        read_everything(&path);
    }

    #[test]
    fn plans_of_any_shape_round_trip(
        rows in 0usize..40,
        cols in 0usize..200,
        (codec, bits) in prop::sample::select(
            Codec::ALL
                .iter()
                .flat_map(|&codec| codec.rates().iter().map(move |&bits| (codec, bits)))
                .collect::<Vec<_>>()
        ),
    ) {
        let (_folder, path) = folder();
        let checksums = PartChecksums::default();
        let coding = Coding::Coded { codec, bits, rows, cols, checksums };
        let plan = vec![tensor("w", ElementType::F32, &[rows, cols], coding)];
        let values = weights(rows * cols);
        let settings = Settings::new();
        let writer = Writer::create(&path, plan, WriterOptions { settings, ..options() }).unwrap();
        let written = writer.write("w", &bytes(&values)).unwrap();
        writer.finish().unwrap();
        let file = File::open(&path).unwrap();
        file.check("w").unwrap();
        prop_assert_eq!(file.float32(Isa::Portable, "w").unwrap().len(), values.len());
        let read = file.compare(Isa::best(), "w", &bytes(&values), ElementType::F32).unwrap();
        prop_assert_eq!(read, written);
    }
}
