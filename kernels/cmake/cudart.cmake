# ett_kernels::cudart: the static CUDA runtime and the folder of its headers, from ETT_KERNELS_CUDA_HINTS, CUDA_HOME or the
# usual places; no target if there is none. A host that calls the CUDA runtime itself may link it.
find_library(ETT_KERNELS_CUDART cudart_static
  HINTS ${ETT_KERNELS_CUDA_HINTS} ENV CUDA_HOME PATHS /usr/local/cuda /opt/cuda
  PATH_SUFFIXES lib64 lib lib/${CMAKE_LIBRARY_ARCHITECTURE} targets/${CMAKE_SYSTEM_PROCESSOR}-linux/lib targets/sbsa-linux/lib)
find_path(ETT_KERNELS_CUDA_INCLUDE cuda_runtime_api.h
  HINTS ${ETT_KERNELS_CUDA_HINTS} ENV CUDA_HOME PATHS /usr/local/cuda /opt/cuda
  PATH_SUFFIXES include targets/${CMAKE_SYSTEM_PROCESSOR}-linux/include targets/sbsa-linux/include)
mark_as_advanced(ETT_KERNELS_CUDART ETT_KERNELS_CUDA_INCLUDE)
if(ETT_KERNELS_CUDART AND ETT_KERNELS_CUDA_INCLUDE AND NOT TARGET ett_kernels::cudart)
  add_library(ett_kernels::cudart STATIC IMPORTED GLOBAL)
  set_target_properties(ett_kernels::cudart PROPERTIES IMPORTED_LOCATION "${ETT_KERNELS_CUDART}"
    INTERFACE_INCLUDE_DIRECTORIES "${ETT_KERNELS_CUDA_INCLUDE}" INTERFACE_LINK_LIBRARIES "dl;rt;pthread")
endif()
