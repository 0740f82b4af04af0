//! Matrix products through cuBLASLt, with plans that are chosen once and kept.

use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::cublaslt::{result as lt, sys};

use super::device::{Device, Event, Memory};
use crate::error::{EngineError, Result};

/// Scratch memory that algorithms may use: what NVIDIA advises for Hopper.
const WORKSPACE: usize = 64 << 20;
/// Algorithms that are timed when a plan is made for a batch that will be repeated.
const CANDIDATES: usize = 8;
/// Timed repetitions of a candidate.
const REPEATS: usize = 8;

fn failed(action: &'static str) -> impl FnOnce(lt::CublasError) -> EngineError {
    move |error| EngineError::Device { action, reason: error.to_string() }
}

/// Rows of activations, outputs and inputs of a product.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct ProductShape {
    pub(crate) rows: usize,
    pub(crate) outputs: usize,
    pub(crate) inputs: usize,
}

/// `y = x W^T` for bf16 `x` and `W`, f32 `y`.
pub(crate) struct Gemm {
    device: Arc<Device>,
    handle: sys::cublasLtHandle_t,
    workspace: Memory,
    plans: Mutex<HashMap<ProductShape, Arc<Plan>>>,
}

/// Descriptors and the algorithm of one shape.
struct Plan {
    operation: sys::cublasLtMatmulDesc_t,
    weights: sys::cublasLtMatrixLayout_t,
    input: sys::cublasLtMatrixLayout_t,
    output: sys::cublasLtMatrixLayout_t,
    algorithm: sys::cublasLtMatmulAlgo_t,
}

// SAFETY: descriptors are only read once made; the handle is thread-safe by cuBLASLt's documentation.
unsafe impl Send for Gemm {}
// SAFETY: as above.
unsafe impl Sync for Gemm {}
// SAFETY: as above.
unsafe impl Send for Plan {}
// SAFETY: as above.
unsafe impl Sync for Plan {}

impl Gemm {
    pub(crate) fn new(device: &Arc<Device>) -> Result<Gemm> {
        device.bind()?;
        let workspace = device.allocate(WORKSPACE, "scratch memory of matrix products")?;
        let handle = lt::create_handle().map_err(failed("start cuBLASLt"))?;
        Ok(Gemm { device: Arc::clone(device), handle, workspace, plans: Mutex::default() })
    }

    /// `y [rows, outputs] = x [rows, inputs] W^T` with `W [outputs, inputs]`, all row-major; addresses of device memory.
    pub(crate) fn product(&self, shape: ProductShape, x: u64, weights: u64, y: u64) -> Result<()> {
        let plan = self.plan(shape)?;
        self.run(&plan, &plan.algorithm, x, weights, y)
    }

    /// Chooses the plan of `shape` by timing candidates on these operands; `y` is overwritten. For shapes that come again
    /// and again, before their launches are captured.
    pub(crate) fn tune(&self, shape: ProductShape, x: u64, weights: u64, y: u64) -> Result<()> {
        let (mut plan, candidates) = Plan::candidates(self.handle, shape, CANDIDATES)?;
        let mut best = f64::INFINITY;
        for candidate in candidates {
            if self.run(&plan, &candidate, x, weights, y).is_err() {
                continue;
            }
            let begin = Event::record(&self.device)?;
            for _ in 0..REPEATS {
                self.run(&plan, &candidate, x, weights, y)?;
            }
            let seconds = Event::record(&self.device)?.seconds_since(&begin)?;
            if seconds < best {
                (best, plan.algorithm) = (seconds, candidate);
            }
        }
        self.plans.lock().unwrap_or_else(PoisonError::into_inner).insert(shape, Arc::new(plan));
        Ok(())
    }

    /// Whether a plan for the shape is there.
    pub(crate) fn has(&self, shape: ProductShape) -> bool {
        self.plans.lock().unwrap_or_else(PoisonError::into_inner).contains_key(&shape)
    }

    fn plan(&self, shape: ProductShape) -> Result<Arc<Plan>> {
        let mut plans = self.plans.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(plan) = plans.get(&shape) {
            return Ok(Arc::clone(plan));
        }
        let plan = Arc::new(Plan::candidates(self.handle, shape, 1)?.0);
        plans.insert(shape, Arc::clone(&plan));
        Ok(plan)
    }

    fn run(&self, plan: &Plan, algorithm: &sys::cublasLtMatmulAlgo_t, x: u64, weights: u64, y: u64) -> Result<()> {
        let (one, zero) = (1.0f32, 0.0f32);
        let number = |x: &f32| std::ptr::from_ref(x).cast::<c_void>();
        // SAFETY: descriptors live in the plan; the operands' sizes are those of the plan's shape, by the callers; the
        // stream orders the workspace's users.
        unsafe {
            lt::matmul(
                self.handle,
                plan.operation,
                number(&one),
                number(&zero),
                weights as *const c_void,
                plan.weights,
                x as *const c_void,
                plan.input,
                y as *const c_void,
                plan.output,
                y as *mut c_void,
                plan.output,
                algorithm,
                self.workspace.address() as *mut c_void,
                WORKSPACE,
                self.device.stream().cast(),
            )
        }
        .map_err(failed("multiply matrices"))
    }
}

impl Drop for Gemm {
    fn drop(&mut self) {
        let _ = self.device.bind();
        // SAFETY: created by `new`, destroyed once.
        let _ = unsafe { lt::destroy_handle(self.handle) };
    }
}

impl Plan {
    /// A plan with cuBLASLt's first choice, and up to `count` choices. In its column-major terms the product is
    /// `Y^T [outputs, rows] = W [inputs, outputs]^T X^T [inputs, rows]`.
    fn candidates(
        handle: sys::cublasLtHandle_t,
        shape: ProductShape,
        count: usize,
    ) -> Result<(Plan, Vec<sys::cublasLtMatmulAlgo_t>)> {
        let ProductShape { rows, outputs, inputs } = shape;
        let layout = |kind, rows: usize, columns: usize| {
            lt::create_matrix_layout(kind, rows as u64, columns as u64, rows as i64)
                .map_err(failed("describe a matrix"))
        };
        let (bf16, f32) = (sys::cudaDataType::CUDA_R_16BF, sys::cudaDataType::CUDA_R_32F);
        let mut plan = Plan {
            operation: lt::create_matmul_desc(sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, f32)
                .map_err(failed("describe a product"))?,
            weights: layout(bf16, inputs, outputs)?,
            input: layout(bf16, inputs, rows)?,
            output: layout(f32, outputs, rows)?,
            // SAFETY: plain numbers, overwritten below.
            algorithm: unsafe { std::mem::zeroed() },
        };
        // CUBLAS_OP_T, of cuBLAS's own header.
        let transposed = 1i32;
        // SAFETY: the descriptor lives, the attribute has the type and size that cuBLASLt asks for.
        unsafe {
            lt::set_matmul_desc_attribute(
                plan.operation,
                sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA,
                std::ptr::from_ref(&transposed).cast(),
                size_of_val(&transposed),
            )
        }
        .map_err(failed("describe a product"))?;
        let found = plan.choices(handle, count)?;
        plan.algorithm = found[0];
        Ok((plan, found))
    }

    /// cuBLASLt's choices, best first; at least one.
    fn choices(&self, handle: sys::cublasLtHandle_t, count: usize) -> Result<Vec<sys::cublasLtMatmulAlgo_t>> {
        let preference = lt::create_matmul_pref().map_err(failed("describe preferences"))?;
        let workspace = WORKSPACE;
        // SAFETY: plain numbers, written by the library.
        let mut found: Vec<sys::cublasLtMatmulHeuristicResult_t> = vec![unsafe { std::mem::zeroed() }; count];
        let mut returned = 0;
        // SAFETY: all descriptors live; `found` has room for `count` results.
        let status = unsafe {
            lt::set_matmul_pref_attribute(
                preference,
                sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                std::ptr::from_ref(&workspace).cast(),
                size_of::<usize>(),
            )
            .map_err(failed("describe preferences"))?;
            let status = sys::cublasLtMatmulAlgoGetHeuristic(
                handle,
                self.operation,
                self.weights,
                self.input,
                self.output,
                self.output,
                preference,
                count as i32,
                found.as_mut_ptr(),
                &mut returned,
            );
            let _ = lt::destroy_matmul_pref(preference);
            status
        };
        status.result().map_err(failed("choose an algorithm for a product"))?;
        let good =
            found.iter().take(returned as usize).filter(|f| f.state == sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS);
        let algorithms: Vec<_> = good.map(|f| f.algo).collect();
        if algorithms.is_empty() {
            return Err(failed("choose an algorithm for a product")(lt::CublasError(
                sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED,
            )));
        }
        Ok(algorithms)
    }
}

impl Drop for Plan {
    fn drop(&mut self) {
        // SAFETY: each was created once and is destroyed once.
        unsafe {
            let _ = lt::destroy_matmul_desc(self.operation);
            for layout in [self.weights, self.input, self.output] {
                let _ = lt::destroy_matrix_layout(layout);
            }
        }
    }
}
