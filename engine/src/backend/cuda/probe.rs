//! Finds CUDA's libraries before anything calls them: the binding panics when a library or a symbol is missing.

use std::ffi::{CStr, CString};
use std::sync::OnceLock;

use cudarc::{cublaslt, driver, nvrtc};

use crate::error::{EngineError, Result};

/// Folders that are searched when the system's loader does not find a library by its name.
const FOLDERS: [&str; 6] = [
    "/usr/local/cuda/lib64",
    "/usr/local/cuda/targets/x86_64-linux/lib",
    "/usr/lib/x86_64-linux-gnu",
    "/usr/local/nvidia/lib64",
    "/usr/lib/wsl/lib",
    "/opt/cuda/lib64",
];

/// One of CUDA's libraries as it was found.
struct Library {
    /// File name without version.
    name: &'static str,
    /// What it is needed for.
    purpose: &'static str,
    /// `None`: found with all its symbols. Otherwise what is missing.
    missing: Option<String>,
}

const NOT_FOUND: &str = "not found";

/// Which of the libraries that the CUDA backend needs are missing, and what was looked for; `None`: they are there. Looks
/// for them once per process.
pub fn missing_libraries() -> Option<&'static str> {
    static MISSING: OnceLock<Option<String>> = OnceLock::new();
    MISSING.get_or_init(|| describe(&[driver_library(), nvrtc_library(), cublaslt_library()])).as_deref()
}

fn describe(libraries: &[Library]) -> Option<String> {
    let missing = libraries.iter().filter_map(|library| {
        let why = library.missing.as_ref()?;
        Some(format!("{} ({}) is {why}", library.name, library.purpose))
    });
    let mut missing: Vec<String> = missing.collect();
    if libraries.iter().any(|library| library.missing.as_deref() == Some(NOT_FOUND)) {
        missing.push(format!("the system's loader was asked, and {}", FOLDERS.join(", ")));
    }
    (!missing.is_empty()).then(|| missing.join("; "))
}

/// # Errors
/// [`EngineError::NoDevice`] with everything that is missing.
pub(crate) fn require_libraries() -> Result<()> {
    missing_libraries().map_or(Ok(()), |why| Err(EngineError::NoDevice { why: why.into() }))
}

macro_rules! library {
    ($function:ident, $module:ident, $name:literal, $purpose:literal, $symbols:expr) => {
        fn $function() -> Library {
            let refused = preload($name);
            // SAFETY: opening CUDA's own libraries runs their initialisers, which are sound.
            let present = unsafe { $module::sys::is_culib_present() };
            let missing = if present {
                // SAFETY: symbols are looked up, not called, and the library is there, so that this cannot panic.
                let absent = |symbol: &&&str| unsafe {
                    $module::sys::culib().get::<unsafe extern "C" fn()>(symbol.as_bytes()).is_err()
                };
                let absent: Vec<&str> = $symbols.iter().filter(absent).copied().collect();
                lacking(&absent, $symbols.len())
            } else {
                Some(refused.map_or(NOT_FOUND.into(), |why| format!("found, but the system does not load it: {why}")))
            };
            Library { name: $name, purpose: $purpose, missing }
        }
    };
}

library!(
    driver_library,
    driver,
    "libcuda.so",
    "the NVIDIA driver",
    [
        "cuGetErrorName",
        "cuGetErrorString",
        "cuInit",
        "cuDeviceGet",
        "cuDeviceGetCount",
        "cuDeviceGetName",
        "cuDeviceGetAttribute",
        "cuDeviceTotalMem_v2",
        "cuDevicePrimaryCtxRetain",
        "cuDevicePrimaryCtxRelease_v2",
        "cuCtxSetCurrent",
        "cuCtxGetCurrent",
        "cuDriverGetVersion",
        "cuMemAlloc_v2",
        "cuMemFree_v2",
        "cuMemGetInfo_v2",
        "cuMemHostAlloc",
        "cuMemFreeHost",
        "cuMemcpyHtoDAsync_v2",
        "cuMemcpyDtoHAsync_v2",
        "cuMemcpyDtoDAsync_v2",
        "cuMemsetD8Async",
        "cuModuleLoadData",
        "cuModuleGetFunction",
        "cuFuncSetAttribute",
        "cuLaunchKernelEx",
        "cuStreamCreate",
        "cuStreamSynchronize",
        "cuStreamDestroy_v2",
        "cuStreamWaitEvent",
        "cuStreamBeginCapture_v2",
        "cuStreamEndCapture",
        "cuGraphInstantiateWithFlags",
        "cuGraphLaunch",
        "cuGraphExecDestroy",
        "cuGraphDestroy",
        "cuEventCreate",
        "cuEventRecord",
        "cuEventSynchronize",
        "cuEventElapsedTime",
        "cuEventDestroy_v2",
    ]
);
library!(
    nvrtc_library,
    nvrtc,
    "libnvrtc.so",
    "it compiles the kernels",
    [
        "nvrtcVersion",
        "nvrtcCreateProgram",
        "nvrtcCompileProgram",
        "nvrtcDestroyProgram",
        "nvrtcGetCUBINSize",
        "nvrtcGetCUBIN",
        "nvrtcGetProgramLogSize",
        "nvrtcGetProgramLog",
    ]
);
library!(
    cublaslt_library,
    cublaslt,
    "libcublasLt.so",
    "it multiplies matrices",
    [
        "cublasLtCreate",
        "cublasLtDestroy",
        "cublasLtMatmul",
        "cublasLtMatmulAlgoGetHeuristic",
        "cublasLtMatmulDescCreate",
        "cublasLtMatmulDescDestroy",
        "cublasLtMatmulDescSetAttribute",
        "cublasLtMatrixLayoutCreate",
        "cublasLtMatrixLayoutDestroy",
        "cublasLtMatmulPreferenceCreate",
        "cublasLtMatmulPreferenceDestroy",
        "cublasLtMatmulPreferenceSetAttribute",
    ]
);

/// What is wrong with a library that lacks some of `all` symbols.
fn lacking(absent: &[&str], all: usize) -> Option<String> {
    match absent {
        [] => None,
        absent if absent.len() == all => Some("found, but has none of the functions that such a library has".into()),
        absent => Some(format!("too old: it lacks {}", absent.join(", "))),
    }
}

/// Loads a library by its path when its name alone does not lead to it; afterwards the name does. Where there are files of this
/// name that the system refuses to load: why it refused the first of them.
fn preload(name: &str) -> Option<String> {
    let versions = [".13", ".12", ".1", ""];
    let files = || versions.iter().map(|version| format!("{name}{version}"));
    let paths = files().chain(FOLDERS.iter().flat_map(|folder| files().map(move |file| format!("{folder}/{file}"))));
    let mut refused = None;
    for path in paths {
        match open(&path) {
            Ok(()) => return None,
            // The loader has no number for it. A file that lacks another one says so of that one.
            Err(why) if why.starts_with(&format!("{path}:")) && why.contains("No such file") => {}
            Err(why) => refused = refused.or(Some(why)),
        }
    }
    refused
}

/// Loads a library for the rest of the process.
fn open(path: &str) -> std::result::Result<(), String> {
    let path = CString::new(path).map_err(|error| error.to_string())?;
    // SAFETY: a NUL-terminated path. The handle is kept open on purpose.
    if !unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL) }.is_null() {
        return Ok(());
    }
    // SAFETY: asked by the thread whose call failed; the text is copied before the next call.
    let text = unsafe { libc::dlerror() };
    if text.is_null() {
        return Err("it gives no reason".into());
    }
    // SAFETY: a NUL-terminated text of the loader's.
    Err(unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn what_is_missing_is_said_once_and_nothing_panics() {
        assert_eq!(require_libraries().is_err(), missing_libraries().is_some());
        if let Err(error) = require_libraries() {
            assert!(error.to_string().contains("quire doctor"), "{error}");
        }
        let library = |missing: Option<&str>| Library { name: "a.so", purpose: "x", missing: missing.map(Into::into) };
        assert_eq!(describe(&[library(None), library(None)]), None);
        let text = describe(&[library(Some(NOT_FOUND)), library(Some(NOT_FOUND)), library(Some("too old"))]).unwrap();
        assert!(text.starts_with("a.so (x) is not found; a.so (x) is not found; a.so (x) is too old; the"), "{text}");
        assert_eq!(text.matches(FOLDERS[0]).count(), 1, "{text}");
    }

    #[test]
    fn a_file_that_is_no_library_is_told_from_none() {
        let dir = tempfile::tempdir().unwrap();
        let name = dir.path().join("libquire-test.so").to_str().unwrap().to_owned();
        assert_eq!(preload(&name), None);
        std::fs::write(format!("{name}.1"), "text").unwrap();
        let why = preload(&name).unwrap();
        assert!(why.contains("libquire-test.so.1"), "{why}");
        assert_eq!(lacking(&[], 3), None);
        assert!(lacking(&["f"], 3).unwrap().ends_with("it lacks f"));
        assert!(!lacking(&["f", "g"], 2).unwrap().contains("old"));
    }
}
