//! Philox4x32-10, a counter-based random number generator (Salmon et al., "Parallel random numbers: as easy as 1, 2,
//! 3", SC 2011). A block of four words is a pure function of (seed, stream, index), so the random numbers of any step
//! can be recomputed without those before it.

use rayon::prelude::*;

/// The purpose of random numbers. It is the high half of the stream number, so that two uses of one seed never share
/// numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Purpose {
    /// Initial weights.
    Init = 1,
    /// The order of samples in an epoch.
    Order = 2,
    /// Crops and flips of pictures.
    Augment = 3,
    /// Choice among the captions or questions of a picture.
    Text = 4,
    /// Sampling from a model.
    Sample = 5,
    /// Built-in pictures for training.
    TrainPicture = 6,
    /// Held-out built-in pictures.
    TestPicture = 7,
    /// The choice of what is held out of the built-in pictures.
    Split = 8,
    /// The order of the sources of a mixture.
    Mixture = 9,
}

/// A stream of random numbers, Philox4x32-10. The 128-bit counter is (index, stream), low words first, and the 64-bit
/// key is the seed; cuRAND's `curand_init(seed, stream, offset)` uses the same layout.
#[derive(Debug, Clone)]
pub struct Philox {
    seed: u64,
    stream: u64,
    next: u64,
    block: [u32; 4],
    used: usize,
    spare: Option<f64>,
}

impl Philox {
    /// The stream `stream` of `seed`, at its start.
    pub fn new(seed: u64, stream: u64) -> Self {
        Philox { seed, stream, next: 0, block: [0; 4], used: 4, spare: None }
    }

    /// The stream for one purpose and one number (a step, an epoch, a parameter).
    pub fn of(seed: u64, purpose: Purpose, number: u32) -> Self {
        Self::new(seed, (purpose as u64) << 32 | u64::from(number))
    }

    /// The same stream, continued from its block `index`.
    pub fn from_block(self, index: u64) -> Self {
        Philox { next: index, used: 4, spare: None, ..self }
    }

    /// Block `index` of a stream: its words `4 * index` to `4 * index + 3`, computed without any state.
    pub fn at(seed: u64, stream: u64, index: u64) -> [u32; 4] {
        philox4x32(
            [index as u32, (index >> 32) as u32, stream as u32, (stream >> 32) as u32],
            [seed as u32, (seed >> 32) as u32],
        )
    }

    /// The next 32 random bits.
    pub fn u32(&mut self) -> u32 {
        if self.used == 4 {
            self.block = Self::at(self.seed, self.stream, self.next);
            self.next = self.next.wrapping_add(1);
            self.used = 0;
        }
        self.used += 1;
        self.block[self.used - 1]
    }

    /// The next 64 random bits: two words, the low one first.
    pub fn u64(&mut self) -> u64 {
        let low = u64::from(self.u32());
        low | u64::from(self.u32()) << 32
    }

    /// Uniform in [0, 1), a multiple of 2^-53.
    pub fn uniform(&mut self) -> f64 {
        (self.u64() >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
    }

    /// Standard normal, by the Box-Muller transform; the second value of each pair is kept for the next call.
    pub fn normal(&mut self) -> f64 {
        if let Some(z) = self.spare.take() {
            return z;
        }
        // 1 - uniform is in (0, 1], where the logarithm is finite.
        let r = (-2.0 * (1.0 - self.uniform()).ln()).sqrt();
        let (sin, cos) = (std::f64::consts::TAU * self.uniform()).sin_cos();
        self.spare = Some(r * sin);
        r * cos
    }

    /// Uniform in `0..n`, without bias; 0 for `n` = 0.
    pub fn below(&mut self, n: usize) -> usize {
        let n = n as u64;
        if n == 0 {
            return 0;
        }
        // Lemire's method: the high half of a 64 x 64 bit product, after rejecting the few low halves that would make
        // some results more frequent.
        let reject = n.wrapping_neg() % n;
        loop {
            let product = u128::from(self.u64()) * u128::from(n);
            if product as u64 >= reject {
                return (product >> 64) as usize;
            }
        }
    }

    /// Shuffles `items` uniformly (Fisher-Yates).
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i + 1));
        }
    }

    /// Fills `out` with standard normals, in parallel and identically for any number of threads: four values from
    /// each block, starting with the next whole block. The values differ from those of [`Philox::normal`]: they are
    /// computed in f32 throughout, with |z| below 6.77.
    pub fn fill_normal(&mut self, out: &mut [f32]) {
        const BLOCKS: usize = 4096;
        let (seed, stream, first) = (self.seed, self.stream, self.next);
        out.par_chunks_mut(4 * BLOCKS).enumerate().for_each(|(chunk, out)| {
            let first = first.wrapping_add((chunk * BLOCKS) as u64);
            for (i, quad) in out.chunks_mut(4).enumerate() {
                let [a, b, c, d] = Self::at(seed, stream, first.wrapping_add(i as u64));
                let ((p, q), (r, s)) = (box_muller(a, b), box_muller(c, d));
                quad.copy_from_slice(&[p, q, r, s][..quad.len()]);
            }
        });
        self.next = first.wrapping_add(out.len().div_ceil(4) as u64);
        self.used = 4;
        self.spare = None;
    }
}

fn box_muller(a: u32, b: u32) -> (f32, f32) {
    const BITS_32: f32 = 1.0 / 4_294_967_296.0;
    const BITS_24: f32 = 1.0 / 16_777_216.0;
    // Adding 0.5 keeps the argument of the logarithm above 0; all 32 bits are used because precision matters near 0.
    let r = (-2.0 * ((a as f32 + 0.5) * BITS_32).ln()).sqrt();
    let (sin, cos) = (std::f32::consts::TAU * ((b >> 8) as f32 * BITS_24)).sin_cos();
    (r * cos, r * sin)
}

fn philox4x32(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for round in 0..10 {
        if round > 0 {
            key = [key[0].wrapping_add(0x9E37_79B9), key[1].wrapping_add(0xBB67_AE85)];
        }
        let p0 = u64::from(counter[0]) * 0xD251_1F53;
        let p1 = u64::from(counter[2]) * 0xCD9E_8D57;
        counter = [
            (p1 >> 32) as u32 ^ counter[1] ^ key[0],
            p1 as u32,
            (p0 >> 32) as u32 ^ counter[3] ^ key[1],
            p0 as u32,
        ];
    }
    counter
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Known answers from the Random123 distribution, `kat_vectors`, philox4x32 with 10 rounds.
    #[test]
    fn known_answers() {
        for (counter, key, want) in [
            ([0; 4], [0; 2], [0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8]),
            ([u32::MAX; 4], [u32::MAX; 2], [0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd]),
            (
                [0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344],
                [0xa4093822, 0x299f31d0],
                [0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1],
            ),
        ] {
            assert_eq!(philox4x32(counter, key), want);
        }
        let at = Philox::at(0x299f31d0_a4093822, 0x03707344_13198a2e, 0x85a308d3_243f6a88);
        assert_eq!(at, [0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1]);
    }

    #[test]
    fn a_stream_is_its_blocks_in_order() {
        let mut rng = Philox::new(7, 9);
        let words: Vec<u32> = (0..12).map(|_| rng.u32()).collect();
        let blocks: Vec<u32> = (0..3).flat_map(|i| Philox::at(7, 9, i)).collect();
        assert_eq!(words, blocks);
        assert_eq!(rng.from_block(1).u32(), words[4]);
        assert_eq!(Philox::new(7, 9).u64(), u64::from(words[0]) | u64::from(words[1]) << 32);
        assert_ne!(Philox::of(7, Purpose::Init, 0).u64(), Philox::of(7, Purpose::Order, 0).u64());
        assert_ne!(Philox::of(7, Purpose::Init, 0).u64(), Philox::of(7, Purpose::Init, 1).u64());
    }

    #[test]
    fn uniform_has_the_right_moments() {
        let mut rng = Philox::new(1, 2);
        let v: Vec<f64> = (0..100_000).map(|_| rng.uniform()).collect();
        assert!(v.iter().all(|x| (0.0..1.0).contains(x)));
        let mean = v.iter().sum::<f64>() / v.len() as f64;
        assert!((mean - 0.5).abs() < 0.005, "{mean}");
    }

    fn assert_normal(v: &[f64]) {
        let n = v.len() as f64;
        let moment = |p: i32| v.iter().map(|x| x.powi(p)).sum::<f64>() / n;
        assert!(moment(1).abs() < 0.01, "mean {}", moment(1));
        assert!((moment(2) - 1.0).abs() < 0.02, "variance {}", moment(2));
        assert!(moment(3).abs() < 0.05, "skewness {}", moment(3));
        assert!((moment(4) - 3.0).abs() < 0.1, "kurtosis {}", moment(4));
        let lag = v.windows(2).map(|w| w[0] * w[1]).sum::<f64>() / n;
        assert!(lag.abs() < 0.01, "correlation of neighbours {lag}");
    }

    #[test]
    fn normals_have_the_right_moments() {
        let mut rng = Philox::new(3, 4);
        assert_normal(&(0..200_000).map(|_| rng.normal()).collect::<Vec<_>>());
        let mut bulk = vec![0.0; 200_001];
        rng.fill_normal(&mut bulk);
        assert_normal(&bulk.iter().map(|&x| f64::from(x)).collect::<Vec<_>>());
        for (a, b) in [(0, 0), (u32::MAX, u32::MAX), (0, u32::MAX)] {
            let (x, y) = box_muller(a, b);
            assert!(x.is_finite() && y.is_finite() && x.abs() < 6.77 && y.abs() < 6.77);
        }
    }

    #[test]
    fn bulk_normals_do_not_depend_on_threads_or_length() {
        let bulk = |threads: usize, n: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let mut v = vec![0.0; n];
            let mut rng = Philox::new(5, 6);
            rng.u32();
            pool.install(|| rng.fill_normal(&mut v));
            (v, rng.u32())
        };
        let (one, after) = bulk(1, 50_001);
        assert_eq!((one.clone(), after), bulk(3, 50_001));
        assert_eq!(one[..17], bulk(2, 17).0);
        assert_eq!(after, Philox::at(5, 6, 1 + 50_001u64.div_ceil(4))[0]);
    }

    #[test]
    fn below_is_even_and_bounded() {
        let mut rng = Philox::new(8, 0);
        assert_eq!(rng.below(0), 0);
        assert_eq!(rng.below(1), 0);
        let mut counts = [0; 7];
        for _ in 0..70_000 {
            counts[rng.below(7)] += 1;
        }
        assert!(counts.iter().all(|&c: &i32| (c - 10_000).abs() < 400), "{counts:?}");
    }

    #[test]
    fn shuffle_permutes() {
        let mut v: Vec<usize> = (0..100).collect();
        Philox::new(1, 1).shuffle(&mut v);
        assert_ne!(v, (0..100).collect::<Vec<_>>());
        v.sort();
        assert_eq!(v, (0..100).collect::<Vec<_>>());
    }
}
