/* bind(2) for programs that can only be told to listen at every address of a machine: they listen at one.
 *
 * Loaded before the C library by LD_PRELOAD into all of a job's processes; see listening.py. TCP alone, and nothing that
 * names an address itself is changed.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dlfcn.h>
#include <netinet/in.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

typedef int bind_function(int, const struct sockaddr *, socklen_t);

static struct in_addr ip;
static int active;

/* Once, before there are threads: getenv is not safe beside setenv. */
__attribute__((constructor)) static void prepare(void) {
    const char *only = getenv("MVHPC_LISTEN");
    active = only && inet_pton(AF_INET, only, &ip) == 1;
}

int bind(int descriptor, const struct sockaddr *address, socklen_t length) {
    bind_function *libc = (bind_function *)dlsym(RTLD_NEXT, "bind");
    int type = 0;
    socklen_t size = sizeof type;
    if (!active || getsockopt(descriptor, SOL_SOCKET, SO_TYPE, &type, &size) || type != SOCK_STREAM)
        return libc(descriptor, address, length);
    if (address->sa_family == AF_INET && length >= sizeof(struct sockaddr_in)) {
        struct sockaddr_in v4;
        memcpy(&v4, address, sizeof v4);
        if (v4.sin_addr.s_addr == htonl(INADDR_ANY)) {
            v4.sin_addr = ip;
            return libc(descriptor, (struct sockaddr *)&v4, sizeof v4);
        }
    }
    if (address->sa_family == AF_INET6 && length >= sizeof(struct sockaddr_in6)) {
        struct sockaddr_in6 v6;
        memcpy(&v6, address, sizeof v6);
        if (IN6_IS_ADDR_UNSPECIFIED(&v6.sin6_addr)) { /* both families: ::ffff:ip is the IPv4 address */
            const int no = 0;
            setsockopt(descriptor, IPPROTO_IPV6, IPV6_V6ONLY, &no, sizeof no);
            v6.sin6_addr.s6_addr[10] = v6.sin6_addr.s6_addr[11] = 0xff;
            memcpy(&v6.sin6_addr.s6_addr[12], &ip, sizeof ip);
            return libc(descriptor, (struct sockaddr *)&v6, sizeof v6);
        }
    }
    return libc(descriptor, address, length);
}
