//! Finds CUDA's libraries before anything calls them: the binding panics when a library or a symbol is missing.

use std::ffi::CString;
use std::os::raw::c_char;
use std::path::Path;
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
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Library {
    /// File name without version.
    pub name: &'static str,
    /// What it is needed for.
    pub purpose: &'static str,
    /// `None`: found with all its symbols. Otherwise what is missing.
    pub missing: Option<String>,
}

/// The libraries that the CUDA backend needs. Looks for them once per process.
pub fn libraries() -> &'static [Library] {
    static FOUND: OnceLock<Vec<Library>> = OnceLock::new();
    FOUND.get_or_init(|| vec![driver_library(), nvrtc_library(), cublaslt_library()])
}

/// # Errors
/// [`EngineError::NoDevice`] with everything that is missing.
pub(crate) fn require_libraries() -> Result<()> {
    let missing: Vec<String> = libraries()
        .iter()
        .filter_map(|l| l.missing.as_ref().map(|why| format!("{} ({}): {why}", l.name, l.purpose)))
        .collect();
    if missing.is_empty() { Ok(()) } else { Err(EngineError::NoDevice { why: missing.join("; ") }) }
}

macro_rules! library {
    ($function:ident, $module:ident, $name:literal, $purpose:literal, $symbols:expr) => {
        fn $function() -> Library {
            preload($name);
            // SAFETY: opening CUDA's own libraries runs their initialisers, which are sound.
            let present = unsafe { $module::sys::is_culib_present() };
            let missing = if present {
                // SAFETY: symbols are looked up, not called, and the library is there, so that this cannot panic.
                let absent = |symbol: &&&str| unsafe {
                    $module::sys::culib().get::<unsafe extern "C" fn()>(symbol.as_bytes()).is_err()
                };
                let absent: Vec<&str> = $symbols.iter().filter(absent).copied().collect();
                (!absent.is_empty()).then(|| format!("it is too old: it lacks {}", absent.join(", ")))
            } else {
                Some(format!("not found by the system's loader nor in {}", FOLDERS.join(", ")))
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

/// Loads a library by its path when its name alone does not lead to it; afterwards the name does.
fn preload(name: &str) {
    let open = |path: &Path| {
        let Ok(path) = CString::new(path.to_string_lossy().as_bytes()) else { return false };
        // SAFETY: a NUL-terminated path. The handle is kept open on purpose, for the rest of the process.
        !unsafe { libc::dlopen(path.as_ptr() as *const c_char, libc::RTLD_NOW | libc::RTLD_GLOBAL) }.is_null()
    };
    let versions = [".13", ".12", ".1", ""];
    if versions.iter().any(|version| open(Path::new(&format!("{name}{version}")))) {
        return;
    }
    for folder in FOLDERS {
        if versions.iter().any(|version| open(&Path::new(folder).join(format!("{name}{version}")))) {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_library_is_accounted_for_and_nothing_panics() {
        let found = libraries();
        assert_eq!(found.iter().map(|l| l.name).collect::<Vec<_>>(), ["libcuda.so", "libnvrtc.so", "libcublasLt.so"]);
        let missing = found.iter().filter(|l| l.missing.is_some()).count();
        assert_eq!(require_libraries().is_err(), missing > 0);
        if let Err(error) = require_libraries() {
            assert!(error.to_string().contains("quire doctor"), "{error}");
        }
    }
}
