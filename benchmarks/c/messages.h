/* What may live here: what the reference servers share that find messages in what they read: the unfinished message at
 * the end of a read is kept for the next one.
 */
#include "server.h"

enum { MAX_MESSAGE = 65536 };

struct unfinished {         /* all zero while there is nothing */
    char *data;
    size_t size;
};

static char input[MAX_MESSAGE + READ_SIZE];

/* Read once: how much is in `input` then, what was unfinished included; 0 if nothing came, -1 if the connection must end. */
static ssize_t read_input(int fd, struct unfinished *unfinished)
{
    size_t before = unfinished->size;
    ssize_t got = recv(fd, input + before, READ_SIZE, 0);
    if (got <= 0)
        return got < 0 && (errno == EAGAIN || errno == EINTR) ? 0 : -1;
    if (before > 0) {
        memcpy(input, unfinished->data, before);
        free(unfinished->data);
        memset(unfinished, 0, sizeof *unfinished);
    }
    return (ssize_t)before + got;
}

/* Keep the beginning of a message; false if it is too long. */
static bool keep_unfinished(struct unfinished *unfinished, const char *data, size_t size)
{
    if (size == 0)
        return true;
    unfinished->data = size < MAX_MESSAGE ? malloc(size) : NULL;
    if (unfinished->data == NULL)
        return false;
    memcpy(unfinished->data, data, size);
    unfinished->size = size;
    return true;
}
