//! Benches of the kernels. There is no GPU code yet, so they time the CPU device, at small shapes; throughput is
//! in operations of the minimum work. One module a family, as in `src/ops`.

mod attention;
mod codebook;
mod common;
mod conv;
mod losses;
mod norm;
mod optim;
mod products;
mod step;

use std::time::Duration;

use criterion::Criterion;

fn main() {
    let mut c = Criterion::default()
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1))
        .sample_size(10)
        .configure_from_args();
    products::benches(&mut c);
    conv::benches(&mut c);
    norm::benches(&mut c);
    attention::benches(&mut c);
    codebook::benches(&mut c);
    losses::benches(&mut c);
    optim::benches(&mut c);
    step::benches(&mut c);
    c.final_summary();
}
