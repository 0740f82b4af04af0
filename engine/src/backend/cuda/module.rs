//! Kernels: compiled with NVRTC for the GPU at hand, kept on disk, loaded.

use std::ffi::{CStr, CString, c_char};
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use cudarc::driver::{result as driver, sys};
use cudarc::nvrtc::{result as nvrtc, sys as nvrtc_sys};
use rayon::prelude::*;

use super::device::{Device, failed};
use crate::error::{EngineError, Result};

macro_rules! sources {
    ($($name:literal),* $(,)?) => {
        [$(($name, include_str!(concat!("../../../kernels/", $name)))),*]
    };
}

/// The files that are compiled, one program each.
const SOURCES: [(&str, &str); 19] = sources![
    "embed.cu",
    "norm.cu",
    "rope_append.cu",
    "kv_rows.cu",
    "kv_shift.cu",
    "swiglu.cu",
    "split.cu",
    "merge.cu",
    "sample.cu",
    "draw.cu",
    "gemv.cu",
    "fill.cu",
    "attention_decode.cu",
    "attention_prefill.cu",
    "attention_prefill_sm90.cu",
    "attention_merge.cu",
    "attention_any.cu",
    "attention_paid.cu",
    "attention_paid_mma.cu",
];
/// What they include.
const HEADERS: [(&str, &str); 4] =
    sources!["common.cuh", "rotate.cuh", "attention_common.cuh", "attention_prefill_common.cuh"];

/// Prefill attention for every card, and for Hopper's own matrix instructions.
pub(crate) const PREFILL: &str = "attention_prefill.cu";
pub(crate) const PREFILL_HOPPER: &str = "attention_prefill_sm90.cu";

const OPTIONS: [&str; 1] = ["--std=c++17"];

/// The files for a GPU of this compute capability; `portable`: none that is for such GPUs alone.
fn sources_for(major: i32, portable: bool) -> impl Iterator<Item = &'static (&'static str, &'static str)> {
    let other = if major == 9 && !portable { PREFILL } else { PREFILL_HOPPER };
    SOURCES.iter().filter(move |(name, _)| *name != other)
}

/// An entry point of a loaded module.
#[derive(Clone, Copy)]
pub(crate) struct Kernel {
    pub(crate) function: sys::CUfunction,
    /// For errors.
    pub(crate) file: &'static str,
}

// SAFETY: a handle into a module that lives as long as the device's context.
unsafe impl Send for Kernel {}
// SAFETY: as above.
unsafe impl Sync for Kernel {}

/// All programs, loaded. They stay loaded as long as the process has the context.
pub(crate) struct Modules {
    device: Arc<Device>,
    loaded: Vec<(&'static str, sys::CUmodule)>,
    /// Programs that came from the disk.
    pub(crate) cached: usize,
    /// Programs that had to be compiled.
    pub(crate) compiled: usize,
}

// SAFETY: module handles, guarded by the driver.
unsafe impl Send for Modules {}
// SAFETY: as above.
unsafe impl Sync for Modules {}

impl Modules {
    /// Compiles what `cache` does not hold. `None`: nothing is kept.
    pub(crate) fn load(device: &Arc<Device>, cache: Option<&Path>, portable: bool) -> Result<Modules> {
        let (major, minor) = device.capability;
        let architecture = architecture(major, minor);
        let identity = versions()?;
        let sources: Vec<_> = sources_for(major, portable).collect();
        let programs: Vec<(&str, Vec<u8>, bool)> = sources
            .into_par_iter()
            .map(|(name, source)| {
                let (binary, cached) = binary(name, source, &architecture, &identity, cache)?;
                Ok((*name, binary, cached))
            })
            .collect::<Result<_>>()?;
        device.bind()?;
        let mut modules = Modules { device: Arc::clone(device), loaded: Vec::new(), cached: 0, compiled: 0 };
        for (name, binary, cached) in &programs {
            // SAFETY: a cubin that NVRTC has made, whole: its checksum was compared if it came from the disk.
            let module = unsafe { driver::module::load_data(binary.as_ptr().cast()) }.map_err(|e| {
                EngineError::Kernel { kernel: (*name).into(), why: format!("the driver does not load it: {e}") }
            })?;
            modules.loaded.push((name, module));
            modules.cached += usize::from(*cached);
            modules.compiled += usize::from(!*cached);
        }
        Ok(modules)
    }

    /// Whether this file was loaded.
    pub(crate) fn has(&self, file: &str) -> bool {
        self.loaded.iter().any(|(loaded, _)| *loaded == file)
    }

    /// The entry point `name` of the file `file`; `shared`: the most dynamic shared memory a launch will ask for.
    pub(crate) fn kernel(&self, file: &str, name: &str, shared: usize) -> Result<Kernel> {
        let missing = |why: String| EngineError::Kernel { kernel: format!("{name} in {file}"), why };
        let found = self.loaded.iter().find(|(loaded, _)| *loaded == file);
        let (file, module) = *found.ok_or_else(|| missing("no such file".into()))?;
        let symbol = CString::new(name).map_err(|_| missing("its name holds a NUL".into()))?;
        self.device.bind()?;
        // SAFETY: the module is loaded.
        let function = unsafe { driver::module::get_function(module, symbol) }.map_err(|e| missing(e.to_string()))?;
        use sys::CUfunction_attribute as Attribute;
        let mut attributes = vec![
            // All kernels with the same split of L1 and shared memory: those with different splits are never on a multiprocessor
            // together, so that none could begin before its predecessor's end.
            (Attribute::CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, 100),
        ];
        if shared > 0 {
            // A block gets more than 48 KiB only on request, its static part counted.
            attributes.push((Attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, shared as i32));
        }
        for (attribute, value) in attributes {
            // SAFETY: a function of a loaded module.
            unsafe { driver::function::set_function_attribute(function, attribute, value) }
                .map_err(|e| missing(format!("{attribute:?} of {value} is refused: {e}")))?;
        }
        Ok(Kernel { function, file })
    }
}

/// The target of NVRTC: with the instructions that only this generation has, where there are such.
pub(crate) fn architecture(major: i32, minor: i32) -> String {
    let own = if major >= 9 { "a" } else { "" };
    format!("sm_{major}{minor}{own}")
}

/// Versions of compiler and driver: a change of either compiles anew.
fn versions() -> Result<String> {
    let (mut major, mut minor, mut driver) = (0, 0, 0);
    // SAFETY: out-parameters that live over the calls.
    unsafe {
        nvrtc_sys::nvrtcVersion(&mut major, &mut minor)
            .result()
            .map_err(|e| EngineError::Device { action: "ask NVRTC for its version", reason: format!("{e:?}") })?;
        sys::cuDriverGetVersion(&mut driver).result().map_err(failed("ask the driver for its version"))?;
    }
    Ok(format!("nvrtc {major}.{minor} driver {driver}"))
}

/// A program's binary for the architecture, and whether the disk held it.
fn binary(
    name: &str,
    source: &str,
    architecture: &str,
    identity: &str,
    cache: Option<&Path>,
) -> Result<(Vec<u8>, bool)> {
    let file = cache.map(|folder| folder.join(format!("{}.cubin", key(name, source, architecture, identity))));
    if let Some(binary) = file.as_deref().and_then(read_checked) {
        return Ok((binary, true));
    }
    let binary = compile(name, source, architecture)?;
    if let Some(file) = &file
        && let Err(error) = write_checked(file, &binary)
    {
        tracing::warn!(%error, file = %file.display(), "a compiled kernel could not be kept; it will be compiled again");
    }
    Ok((binary, false))
}

/// Everything that changes what the compiler makes.
fn key(name: &str, source: &str, architecture: &str, identity: &str) -> String {
    let mut hasher = blake3::Hasher::new_derive_key("quire kernel 1");
    let parts = [name, source, architecture, identity].into_iter().chain(HEADERS.iter().flat_map(|(n, s)| [*n, *s]));
    for part in parts.chain(OPTIONS) {
        hasher.update(&(part.len() as u64).to_le_bytes()).update(part.as_bytes());
    }
    hasher.finalize().to_hex().to_string()
}

/// A kept binary; `None` when it is absent or not whole.
fn read_checked(file: &Path) -> Option<Vec<u8>> {
    let bytes = fs::read(file).ok()?;
    let (checksum, binary) = bytes.split_at_checked(32)?;
    (blake3::hash(binary).as_bytes() == checksum).then(|| binary.to_vec())
}

/// Renamed into place, so that no reader sees half of it.
fn write_checked(file: &Path, binary: &[u8]) -> std::io::Result<()> {
    let folder: PathBuf = file.parent().unwrap_or(Path::new(".")).into();
    fs::create_dir_all(&folder)?;
    // Several engines of a process may keep the same kernel at the same time.
    static KEPT: AtomicU64 = AtomicU64::new(0);
    let part = file.with_extension(format!("part{}-{}", std::process::id(), KEPT.fetch_add(1, Ordering::Relaxed)));
    let mut out = fs::File::create(&part)?;
    out.write_all(blake3::hash(binary).as_bytes())?;
    out.write_all(binary)?;
    out.sync_all()?;
    fs::rename(&part, file)
}

/// Compiles one file to a cubin. Needs NVRTC alone, no GPU.
///
/// # Errors
/// [`EngineError::Kernel`] with the compiler's messages.
pub(crate) fn compile(name: &str, source: &str, architecture: &str) -> Result<Vec<u8>> {
    let wrong = |why: String| EngineError::Kernel { kernel: name.into(), why };
    let text = |s: &str| CString::new(s).map_err(|_| wrong("its source holds a NUL".into()));
    let (source, title) = (text(source)?, text(name)?);
    let headers: Vec<CString> = HEADERS.iter().map(|(_, s)| text(s)).collect::<Result<_>>()?;
    let names: Vec<CString> = HEADERS.iter().map(|(n, _)| text(n)).collect::<Result<_>>()?;
    let pointers = |list: &[CString]| list.iter().map(|s| s.as_ptr()).collect::<Vec<*const c_char>>();
    let (headers_at, names_at) = (pointers(&headers), pointers(&names));
    let mut program = std::ptr::null_mut();
    // SAFETY: all strings live over the call, which copies them.
    let created = unsafe {
        nvrtc_sys::nvrtcCreateProgram(
            &mut program,
            source.as_ptr(),
            title.as_ptr(),
            headers_at.len() as i32,
            headers_at.as_ptr(),
            names_at.as_ptr(),
        )
    };
    created.result().map_err(|e| wrong(format!("NVRTC does not take it: {e:?}")))?;
    let options: Vec<String> =
        OPTIONS.iter().map(|o| (*o).to_string()).chain([format!("--gpu-architecture={architecture}")]).collect();
    // SAFETY: the program was created above and is destroyed once, below.
    unsafe {
        let outcome = match nvrtc::compile_program(program, &options) {
            Ok(()) => take_binary(program).map_err(|e| wrong(format!("NVRTC gives no binary: {e:?}"))),
            Err(_) => {
                let log = nvrtc::get_program_log(program).unwrap_or_default();
                let log: Vec<u8> = log.iter().map(|c| *c as u8).chain([0]).collect();
                let log = CStr::from_bytes_until_nul(&log).unwrap_or_default().to_string_lossy().into_owned();
                Err(wrong(format!("it does not compile for {architecture}: {log}")))
            }
        };
        let _ = nvrtc::destroy_program(program);
        outcome
    }
}

/// # Safety
/// `program` was compiled.
unsafe fn take_binary(program: nvrtc_sys::nvrtcProgram) -> std::result::Result<Vec<u8>, nvrtc::NvrtcError> {
    let mut size = 0;
    // SAFETY: by the caller; the buffer has the size that NVRTC asks for.
    unsafe {
        nvrtc_sys::nvrtcGetCUBINSize(program, &mut size).result()?;
        let mut binary = vec![0u8; size];
        nvrtc_sys::nvrtcGetCUBIN(program, binary.as_mut_ptr().cast()).result()?;
        Ok(binary)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kept_binary_is_used_only_when_whole() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("deep").join("x.cubin");
        assert_eq!(read_checked(&file), None);
        write_checked(&file, b"binary").unwrap();
        assert_eq!(read_checked(&file).as_deref(), Some(&b"binary"[..]));
        let mut bytes = fs::read(&file).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        fs::write(&file, &bytes).unwrap();
        assert_eq!(read_checked(&file), None);
        fs::write(&file, b"short").unwrap();
        assert_eq!(read_checked(&file), None);
    }

    #[test]
    #[ignore = "needs NVRTC"]
    fn every_kernel_compiles_for_every_architecture() {
        let jobs =
            [8, 9, 10].into_iter().flat_map(|major| sources_for(major, false).map(move |source| (source, (major, 0))));
        for ((name, source), (major, minor)) in jobs {
            let binary = compile(name, source, &architecture(major, minor)).unwrap();
            assert_eq!(&binary[..4], b"\x7fELF", "{name}");
        }
    }

    #[test]
    fn the_key_covers_everything_that_changes_the_binary() {
        let keys = [
            key("a.cu", "x", "sm_90a", "nvrtc 13.0 driver 13000"),
            key("b.cu", "x", "sm_90a", "nvrtc 13.0 driver 13000"),
            key("a.cu", "y", "sm_90a", "nvrtc 13.0 driver 13000"),
            key("a.cu", "x", "sm_80", "nvrtc 13.0 driver 13000"),
            key("a.cu", "x", "sm_90a", "nvrtc 13.1 driver 13000"),
        ];
        assert_eq!(keys.iter().collect::<std::collections::HashSet<_>>().len(), keys.len());
        assert_eq!(
            (architecture(8, 0), architecture(9, 0), architecture(10, 0)),
            ("sm_80".into(), "sm_90a".into(), "sm_100a".into())
        );
    }
}
