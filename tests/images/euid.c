/* Installed setuid root: says as whom it runs, so whether it could gain privileges. */
#include <stdio.h>
#include <unistd.h>

int main(void)
{
	printf("Effective uid: %d\n", geteuid());
	return 0;
}
