//! Plain matrix products through cuBLASLt. The algorithm of a shape is what the library's heuristic answers first,
//! asked once: never a matter of timing, so that runs repeat.

use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::{Mutex, PoisonError};

use cudarc::cublaslt::result::{self as lt, CublasError};
use cudarc::cublaslt::sys;

use super::ffi;
use crate::tensor::DType;

/// Scratch memory that algorithms may use: what the library's authors advise for Hopper.
pub(super) const WORKSPACE: usize = 32 << 20;
/// Operands whose address and rows are aligned to this may use every algorithm; the heuristic is told less.
const ALIGNMENT: u32 = 16;

/// Everything that the choice of an algorithm depends on, seen column-major: `d[m, n] = op(a)[m, k] op(b)[k, n]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Shape {
    m: u64,
    n: u64,
    k: u64,
    ta: bool,
    tb: bool,
    act: i32,
    out: i32,
    bias: bool,
    accumulate: bool,
    ld: [i64; 3],
    alignment: [u32; 3],
}

/// A shape's descriptors and algorithm.
struct Plan {
    desc: sys::cublasLtMatmulDesc_t,
    a: sys::cublasLtMatrixLayout_t,
    b: sys::cublasLtMatrixLayout_t,
    d: sys::cublasLtMatrixLayout_t,
    algo: sys::cublasLtMatmulAlgo_t,
}

/// A cuBLASLt handle and the plans made so far.
pub(super) struct Products {
    handle: sys::cublasLtHandle_t,
    /// `None`: the library has no algorithm for this shape.
    plans: Mutex<HashMap<Shape, Option<Plan>>>,
}

// The handle may be used from any thread; plans are used under the lock.
unsafe impl Send for Products {}
unsafe impl Sync for Products {}

fn rows(v: &ffi::ett_view) -> i64 {
    v.dims[..v.rank.max(1) as usize - 1].iter().product()
}

fn cols(v: &ffi::ett_view) -> i64 {
    if v.rank == 0 { 1 } else { v.dims[v.rank as usize - 1] }
}

fn stride(v: &ffi::ett_view) -> i64 {
    if rows(v) > 1 { v.ld } else { cols(v) }
}

/// True for arguments within the contract, in the types that the library gets here.
fn fits(
    a: &ffi::ett_view,
    b: &ffi::ett_view,
    ta: bool,
    tb: bool,
    bias: Option<&ffi::ett_view>,
    y: &ffi::ett_view,
    accumulate: bool,
) -> bool {
    let (f32, bf16) = (DType::F32 as i32, DType::Bf16 as i32);
    let (n, ka) = if ta { (cols(a), rows(a)) } else { (rows(a), cols(a)) };
    let (kb, o) = if tb { (cols(b), rows(b)) } else { (rows(b), cols(b)) };
    (a.dtype == f32 || a.dtype == bf16)
        && b.dtype == a.dtype
        && y.dtype == if accumulate { f32 } else { a.dtype }
        && (ka, n, o) == (kb, rows(y), cols(y))
        && bias.is_none_or(|v| v.dtype == a.dtype && rows(v) * cols(v) == o && stride(v) == cols(v))
}

/// The largest power of two, at most [`ALIGNMENT`], that divides address and row stride.
fn alignment(v: &ffi::ett_view) -> u32 {
    let size = if v.dtype == DType::Bf16 as i32 { 2 } else { 4 };
    let together = v.ptr as u64 | (stride(v) * size) as u64;
    1 << together.trailing_zeros().min(ALIGNMENT.trailing_zeros())
}

fn data_type(dtype: i32) -> sys::cudaDataType {
    match dtype == DType::Bf16 as i32 {
        true => sys::cudaDataType_t::CUDA_R_16BF,
        false => sys::cudaDataType_t::CUDA_R_32F,
    }
}

impl Products {
    /// Opens the library; `None` if it is not installed.
    pub(super) fn new() -> std::result::Result<Option<Self>, CublasError> {
        if !unsafe { sys::is_culib_present() } {
            return Ok(None);
        }
        Ok(Some(Products { handle: lt::create_handle()?, plans: Mutex::default() }))
    }

    /// Enqueues `y = op(a) op(b) + bias`, or `y += op(a) op(b)`. `false`: nothing
    /// was done; the arguments are wrong or empty, which the launcher answers, or the library cannot do this shape.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn run(
        &self,
        a: &ffi::ett_view,
        b: &ffi::ett_view,
        ta: bool,
        tb: bool,
        bias: Option<&ffi::ett_view>,
        y: &ffi::ett_view,
        accumulate: bool,
        workspace: u64,
        stream: *mut c_void,
    ) -> std::result::Result<bool, CublasError> {
        // Row-major y = a b is column-major y' = b' a', so the operands change places.
        let shape = Shape {
            m: cols(y) as u64,
            n: rows(y) as u64,
            k: if ta { rows(a) } else { cols(a) } as u64,
            ta: tb,
            tb: ta,
            act: a.dtype,
            out: y.dtype,
            bias: bias.is_some(),
            accumulate,
            ld: [stride(b), stride(a), stride(y)],
            alignment: [alignment(b), alignment(a), alignment(y)],
        };
        if shape.m == 0 || shape.n == 0 || shape.k == 0 || !fits(a, b, ta, tb, bias, y, accumulate) {
            return Ok(false);
        }
        let mut plans = self.plans.lock().unwrap_or_else(PoisonError::into_inner);
        let plan = match plans.entry(shape) {
            std::collections::hash_map::Entry::Occupied(e) => e.into_mut(),
            std::collections::hash_map::Entry::Vacant(e) => e.insert(self.plan(&shape)?),
        };
        let Some(plan) = plan else { return Ok(false) };
        let (one, beta) = (1f32, if accumulate { 1f32 } else { 0f32 });
        let at = |x: &f32| std::ptr::from_ref(x).cast::<c_void>();
        // Views lie inside their buffers; the descriptors are alive as long as the plan.
        unsafe {
            if let Some(bias) = bias {
                set(
                    plan.desc,
                    sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_BIAS_POINTER,
                    &bias.ptr,
                )?;
            }
            lt::matmul(
                self.handle,
                plan.desc,
                at(&one),
                at(&beta),
                b.ptr,
                plan.a,
                a.ptr,
                plan.b,
                y.ptr,
                plan.d,
                y.ptr,
                plan.d,
                &plan.algo,
                workspace as *mut c_void,
                WORKSPACE,
                stream.cast(),
            )?;
        }
        Ok(true)
    }

    fn plan(&self, s: &Shape) -> std::result::Result<Option<Plan>, CublasError> {
        use sys::cublasLtMatmulDescAttributes_t as Desc;
        use sys::cublasLtMatmulPreferenceAttributes_t as Pref;
        // Plain single precision where operands are f32: never TF32.
        let desc = lt::create_matmul_desc(
            sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
            sys::cudaDataType_t::CUDA_R_32F,
        )?;
        // cublasOperation_t: 0 is as it stands, 1 transposed.
        let op = |t: bool| t as i32;
        let layout = |ty: i32, rows: u64, cols: u64, ld: i64, t: bool| {
            let (rows, cols) = if t { (cols, rows) } else { (rows, cols) };
            lt::create_matrix_layout(data_type(ty), rows, cols, ld.max(rows as i64))
        };
        let a = layout(s.act, s.m, s.k, s.ld[0], s.ta)?;
        let b = layout(s.act, s.k, s.n, s.ld[1], s.tb)?;
        let d = layout(s.out, s.m, s.n, s.ld[2], false)?;
        let pref = lt::create_matmul_pref()?;
        let found = unsafe {
            set(desc, Desc::CUBLASLT_MATMUL_DESC_TRANSA, &op(s.ta))?;
            set(desc, Desc::CUBLASLT_MATMUL_DESC_TRANSB, &op(s.tb))?;
            if s.bias {
                set(
                    desc,
                    Desc::CUBLASLT_MATMUL_DESC_EPILOGUE,
                    &sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS,
                )?;
            }
            prefer(pref, Pref::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &WORKSPACE)?;
            prefer(pref, Pref::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, &s.alignment[0])?;
            prefer(pref, Pref::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, &s.alignment[1])?;
            prefer(pref, Pref::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, &s.alignment[2])?;
            prefer(pref, Pref::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, &s.alignment[2])?;
            let found = lt::get_matmul_algo_heuristic(self.handle, desc, a, b, d, d, pref);
            lt::destroy_matmul_pref(pref)?;
            found
        };
        match found {
            Ok(h) => Ok(Some(Plan { desc, a, b, d, algo: h.algo })),
            Err(CublasError(
                sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED
                | sys::cublasStatus_t::CUBLAS_STATUS_INVALID_VALUE,
            )) => {
                unsafe { destroy(desc, [a, b, d]) };
                Ok(None)
            }
            Err(e) => Err(e),
        }
    }
}

unsafe fn set<T>(
    desc: sys::cublasLtMatmulDesc_t,
    what: sys::cublasLtMatmulDescAttributes_t,
    value: &T,
) -> std::result::Result<(), CublasError> {
    unsafe { lt::set_matmul_desc_attribute(desc, what, std::ptr::from_ref(value).cast(), size_of::<T>()) }
}

unsafe fn prefer<T>(
    pref: sys::cublasLtMatmulPreference_t,
    what: sys::cublasLtMatmulPreferenceAttributes_t,
    value: &T,
) -> std::result::Result<(), CublasError> {
    unsafe { lt::set_matmul_pref_attribute(pref, what, std::ptr::from_ref(value).cast(), size_of::<T>()) }
}

unsafe fn destroy(desc: sys::cublasLtMatmulDesc_t, layouts: [sys::cublasLtMatrixLayout_t; 3]) {
    // Destroying a descriptor that exists does not fail.
    unsafe {
        let _ = lt::destroy_matmul_desc(desc);
        for l in layouts {
            let _ = lt::destroy_matrix_layout(l);
        }
    }
}

impl Drop for Products {
    fn drop(&mut self) {
        for plan in self.plans.get_mut().unwrap_or_else(PoisonError::into_inner).values().flatten() {
            unsafe { destroy(plan.desc, [plan.a, plan.b, plan.d]) };
        }
        let _ = unsafe { lt::destroy_handle(self.handle) };
    }
}
