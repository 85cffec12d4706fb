# What may live here: the functions of the OpenSSL that CPython's ssl uses, found at run time in the library that it has
# loaded. No Python object, and no header of OpenSSL: one wheel works with any version.

cdef extern from "<dlfcn.h>" nogil:
    void* dlopen(const char* path, int flags)
    void* dlsym(void* library, const char* name)
    enum:
        RTLD_LAZY
        RTLD_NOLOAD

cdef enum:
    SSL_ERROR_WANT_READ = 2
    SSL_ERROR_ZERO_RETURN = 6
    BIO_CTRL_RESET = 1
    BIO_CTRL_PENDING = 10

ctypedef int (*SSL_move)(void* ssl, void* data, int size) noexcept nogil
ctypedef int (*SSL_number)(const void* ssl, int value) noexcept nogil
ctypedef int (*SSL_call)(void* ssl) noexcept nogil
ctypedef void* (*SSL_part)(void* ssl) noexcept nogil
ctypedef long (*BIO_control)(void* bio, int command, long number, void* pointer) noexcept nogil
ctypedef void (*Call)() noexcept nogil

cdef struct OpenSSL:
    SSL_move read
    SSL_move write
    SSL_number get_error
    SSL_call shutdown
    SSL_part get_context
    SSL_part get_rbio
    SSL_part get_wbio
    SSL_move bio_read
    SSL_move bio_write
    BIO_control bio_control
    Call clear_errors

cdef inline bint openssl_find(OpenSSL* o, const char* path) noexcept nogil:
    """Look up the functions in the extension module _ssl, which is loaded, and in what it is linked with. False if one
    is missing, as where OpenSSL is a part of Python's own binary."""
    cdef void* library = dlopen(path, RTLD_LAZY | RTLD_NOLOAD)
    if library == NULL:
        return False
    o.read = <SSL_move>dlsym(library, "SSL_read")
    o.write = <SSL_move>dlsym(library, "SSL_write")
    o.shutdown = <SSL_call>dlsym(library, "SSL_shutdown")
    o.get_error = <SSL_number>dlsym(library, "SSL_get_error")
    o.get_context = <SSL_part>dlsym(library, "SSL_get_SSL_CTX")
    o.get_rbio = <SSL_part>dlsym(library, "SSL_get_rbio")
    o.get_wbio = <SSL_part>dlsym(library, "SSL_get_wbio")
    o.bio_read = <SSL_move>dlsym(library, "BIO_read")
    o.bio_write = <SSL_move>dlsym(library, "BIO_write")
    o.bio_control = <BIO_control>dlsym(library, "BIO_ctrl")
    o.clear_errors = <Call>dlsym(library, "ERR_clear_error")
    return (
        o.read != NULL and o.write != NULL and o.get_error != NULL and o.shutdown != NULL and o.clear_errors != NULL
        and o.get_context != NULL and o.get_rbio != NULL and o.get_wbio != NULL and o.bio_read != NULL
        and o.bio_write != NULL and o.bio_control != NULL
    )

cdef inline size_t bio_pending(OpenSSL* o, void* bio) noexcept nogil:
    return <size_t>o.bio_control(bio, BIO_CTRL_PENDING, 0, NULL)
