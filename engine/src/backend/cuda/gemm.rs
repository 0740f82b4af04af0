//! Matrix products through cuBLASLt, with plans that are made once and kept.
//!
//! A plan is cuBLASLt's own first choice for the shape: a rule of the library's, the same at every start. Timing its choices
//! would at times find a faster one, and another one at the next start: the order in which a product is summed, and with it an
//! answer of equal seed, would differ from start to start.

use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::cublaslt::{result as lt, sys};

use super::device::{Device, Memory};
use crate::error::{EngineError, Result};

/// Scratch memory that algorithms may use: what NVIDIA advises for Hopper.
const WORKSPACE: usize = 64 << 20;

fn failed(action: &'static str) -> impl FnOnce(lt::CublasError) -> EngineError {
    move |error| EngineError::Device { action, reason: error.to_string() }
}

/// Rows of activations, outputs and inputs of a product.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct ProductShape {
    pub(crate) rows: usize,
    pub(crate) outputs: usize,
    pub(crate) inputs: usize,
    /// Outputs are rounded to bf16.
    pub(crate) rounded: bool,
}

/// `y = x W^T` for bf16 `x` and `W`, f32 or bf16 `y`.
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

    /// `y [rows, outputs] = x [rows, inputs] W^T` with `W [outputs, inputs]`, all row-major; addresses of device memory, each a
    /// multiple of 256. `accumulate`: what `y` holds is added.
    pub(crate) fn product(&self, shape: ProductShape, x: u64, weights: u64, y: u64, accumulate: bool) -> Result<()> {
        if shape.rows == 0 {
            return Ok(());
        }
        self.run(&*self.plan(shape)?, x, weights, y, accumulate)
    }

    fn plan(&self, shape: ProductShape) -> Result<Arc<Plan>> {
        let mut plans = self.plans.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(plan) = plans.get(&shape) {
            return Ok(Arc::clone(plan));
        }
        let plan = Arc::new(Plan::new(self.handle, shape)?);
        plans.insert(shape, Arc::clone(&plan));
        Ok(plan)
    }

    fn run(&self, plan: &Plan, x: u64, weights: u64, y: u64, accumulate: bool) -> Result<()> {
        let (one, before) = (1.0f32, if accumulate { 1.0f32 } else { 0.0 });
        let number = |x: &f32| std::ptr::from_ref(x).cast::<c_void>();
        // SAFETY: descriptors live in the plan; the operands' sizes are those of the plan's shape, by the callers; the
        // stream orders the workspace's users.
        unsafe {
            lt::matmul(
                self.handle,
                plan.operation,
                number(&one),
                number(&before),
                weights as *const c_void,
                plan.weights,
                x as *const c_void,
                plan.input,
                y as *const c_void,
                plan.output,
                y as *mut c_void,
                plan.output,
                &plan.algorithm,
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
    /// A plan with cuBLASLt's first choice. In its column-major terms the product is
    /// `Y^T [outputs, rows] = W [inputs, outputs]^T X^T [inputs, rows]`.
    fn new(handle: sys::cublasLtHandle_t, shape: ProductShape) -> Result<Plan> {
        let ProductShape { rows, outputs, inputs, rounded } = shape;
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
            output: layout(if rounded { bf16 } else { f32 }, outputs, rows)?,
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
        plan.algorithm = plan.first_choice(handle)?;
        Ok(plan)
    }

    fn first_choice(&self, handle: sys::cublasLtHandle_t) -> Result<sys::cublasLtMatmulAlgo_t> {
        let preference = lt::create_matmul_pref().map_err(failed("describe preferences"))?;
        let workspace = WORKSPACE;
        // SAFETY: plain numbers, written by the library.
        let mut found: sys::cublasLtMatmulHeuristicResult_t = unsafe { std::mem::zeroed() };
        let mut returned = 0;
        // SAFETY: all descriptors live; `found` has room for one result.
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
                1,
                &mut found,
                &mut returned,
            );
            let _ = lt::destroy_matmul_pref(preference);
            status
        };
        status.result().map_err(failed("choose an algorithm for a product"))?;
        if returned < 1 || found.state != sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS {
            return Err(failed("choose an algorithm for a product")(lt::CublasError(
                sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED,
            )));
        }
        Ok(found.algo)
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
