//! Several arrays in one buffer, which is allocated and copied as one: a copy takes the host as long as a launch, however short it
//! is.

use std::ops::Range;

use candle_core::cuda::cudarc::driver::{CudaSlice, DeviceRepr};
use candle_core::{CudaDevice, Error, Result};
use still_compute::cuda::Launch;

use super::layout::{Cursor, uninit};

/// Arrays `0..N` of so many bytes each.
#[derive(Clone, Debug)]
pub(super) struct Sections<const N: usize> {
    buffer: CudaSlice<u8>,
    places: [Range<usize>; N],
}

impl<const N: usize> Sections<N> {
    /// Not initialised.
    pub fn new(device: &CudaDevice, bytes: [usize; N]) -> Result<Self> {
        let mut cursor = Cursor { base: std::ptr::null_mut(), used: 0 };
        let places = bytes.map(|bytes| {
            let start = cursor.used;
            cursor.take::<u8>(bytes);
            start..start + bytes
        });
        Ok(Self { buffer: uninit(device, cursor.used)?, places })
    }

    /// All zeros.
    pub fn zeros(device: &CudaDevice, bytes: [usize; N]) -> Result<Self> {
        let mut sections = Self::new(device, bytes)?;
        device.cuda_stream().memset_zeros(&mut sections.buffer).map_err(Error::wrap)?;
        Ok(sections)
    }

    /// Where an array begins.
    pub fn at<'a, P>(&'a self, launch: &mut Launch<'a>, array: usize) -> *mut P {
        let base: *mut u8 = launch.at(&self.buffer);
        base.wrapping_add(self.places[array].start).cast()
    }

    /// Bytes of an array.
    pub fn bytes(&self, array: usize) -> usize {
        self.places[array].len()
    }

    /// Bytes of all.
    pub fn num_bytes(&self) -> usize {
        self.places.iter().map(Range::len).sum()
    }

    /// Queues a copy of an array to `to`.
    ///
    /// # Safety
    /// There is room for it on the device until the stream has passed.
    pub unsafe fn copy<'a, P>(
        &'a self,
        launch: &mut Launch<'a>,
        array: usize,
        to: *mut P,
    ) -> Result<()> {
        let from = self.at(launch, array);
        // SAFETY: the array is as long as it says, and there is room as the caller says.
        unsafe { launch.copy(from, to.cast(), self.bytes(array)) }
    }

    /// Values `range` of an array, on the host.
    pub fn read<T: DeviceRepr>(
        &self,
        device: &CudaDevice,
        array: usize,
        range: Range<usize>,
    ) -> Result<Vec<T>> {
        if range.is_empty() {
            return Ok(Vec::new());
        }
        let own = self.buffer.slice(self.of_values::<T>(array, &range));
        // SAFETY: an array is of whatever its user reads and writes, and begins at a multiple of its size.
        let values = unsafe { own.transmute::<T>(range.len()) };
        device.clone_dtoh(&values.ok_or_else(outside)?)
    }

    /// All values of an array, on the host.
    pub fn read_all<T: DeviceRepr>(&self, device: &CudaDevice, array: usize) -> Result<Vec<T>> {
        self.read(device, array, 0..self.bytes(array) / size_of::<T>())
    }

    /// Queues a copy of `values` over the first of an array.
    pub fn write<T: DeviceRepr + 'static>(
        &mut self,
        device: &CudaDevice,
        array: usize,
        values: &[T],
    ) -> Result<()> {
        if values.is_empty() {
            return Ok(());
        }
        let place = self.of_values::<T>(array, &(0..values.len()));
        let mut own = self.buffer.slice_mut(place);
        // SAFETY: as above.
        let to = unsafe { own.transmute_mut::<T>(values.len()) };
        device.memcpy_htod(values, &mut to.ok_or_else(outside)?)
    }

    /// Queues zeros over values `range` of an array.
    pub fn clear<T>(
        &mut self,
        device: &CudaDevice,
        array: usize,
        range: Range<usize>,
    ) -> Result<()> {
        let place = self.of_values::<T>(array, &range);
        let zeros = device.cuda_stream().memset_zeros(&mut self.buffer.slice_mut(place));
        zeros.map_err(Error::wrap)
    }

    /// Where values of an array lie in the buffer.
    ///
    /// # Panics
    /// If there are none such.
    fn of_values<T>(&self, array: usize, values: &Range<usize>) -> Range<usize> {
        let (place, size) = (&self.places[array], size_of::<T>());
        let (start, end) = (place.start + values.start * size, place.start + values.end * size);
        assert!(end <= place.end, "values {values:?} of an array of {} bytes", place.len());
        start..end
    }
}

fn outside() -> Error {
    Error::Msg("values outside their array".into())
}
