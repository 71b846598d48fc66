//! Benches of the kernels: on the first GPU at real sizes, by the device's clock; without a GPU on the CPU, at small
//! shapes. `ETT_RECORD=folder cargo bench` also writes the results to that folder. One module per family, as in
//! `src/ops`.

mod attention;
mod codebook;
mod common;
mod conv;
mod inputs;
mod losses;
mod norm;
mod optim;
#[cfg(ett_cuda)]
mod peers;
mod products;
mod step;

use std::time::Duration;

use common::Bench;
use criterion::Criterion;

fn main() {
    let criterion = Criterion::default()
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1))
        .sample_size(10)
        .without_plots()
        .configure_from_args();
    let mut b = Bench::new(criterion).expect("a device");
    b.ceilings().expect("the device copies and multiplies");
    products::benches(&mut b);
    conv::benches(&mut b);
    norm::benches(&mut b);
    attention::benches(&mut b);
    codebook::benches(&mut b);
    losses::benches(&mut b);
    inputs::benches(&mut b);
    optim::benches(&mut b);
    step::benches(&mut b);
    b.finish().expect("the folder given by ETT_RECORD can be written");
}
